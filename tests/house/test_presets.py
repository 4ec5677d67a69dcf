"""Presets: the bundled ones hold together, overrides do what they say, misspelt keys are errors."""

from __future__ import annotations

import tomllib
from importlib import resources
from pathlib import Path

import pytest

from koala_bench.errors import KoalaBenchError
from koala_bench.presets import MethodPreset, Preset, load_preset, preset_names, usual_methods, with_heads
from koala_bench.registry import HEADS, OBJECTIVES, installed
from koala_bench.tree import load_template

VICUNA = ["vicuna-7b", "vicuna-13b", "vicuna-33b"]
RECIPES = {"medusa-1": "medusa", "eagle-1": "eagle"}
SMALL = """
[target]
name = "some/model"

[training]
steps = 5
batch_tokens = 64
learning_rate = 1e-3

[methods.eagle]
head = "eagle"
tree = "chain-2"
"""


@pytest.fixture
def small(tmp_path: Path) -> Path:
    path = tmp_path / "small.toml"
    path.write_text(SMALL)
    return path


def test_the_bundled_presets_are_these() -> None:
    assert preset_names() == sorted(["tiny", "small", "smollm2-135m", *VICUNA, *RECIPES])


@pytest.mark.parametrize("name", ["tiny", *VICUNA])
def test_bundled_presets_name_heads_objectives_and_trees_that_exist_and_fit(name: str) -> None:
    preset = load_preset(name)
    assert usual_methods(preset) == ["vanilla", "medusa", "medusa+koala", "eagle", "eagle+koala"]
    parts = {head + part for head in ("medusa", "eagle") for part in ("", "+koala", "+layers", "+adversarial")}
    further = {
        "prompt_lookup",
        "suffix_lookup",
        "draft_model",
        "medusa+typical",
        "hydra++",
        *(head + part for head in ("hydra", "eagle2", "eagle3") for part in ("", "+koala")),
    }
    rivals = {head + part for head in ("medusa", "eagle") for part in ("+lk", "+lk+layers")}
    rivals |= {"eagle+lk-hybrid", "eagle+tv", "hass", "p-eagle", "dflash", "suffix_lookup+eagle"}
    rivals |= {"token_recycling", "token_recycling-hot"}
    assert set(preset.methods) == parts | further | rivals
    deep = {"hydra++": 4} | ({} if name == "tiny" else {"p-eagle": 4, "dflash": 5})  # as published
    for method, wanted in preset.methods.items():
        assert wanted.head in installed(HEADS)
        assert wanted.objective is None or wanted.objective in installed(OBJECTIVES)
        assert wanted.layers == deep.get(method, 2 if method.endswith(("+koala", "+layers")) else 1)
        objectives = {
            "+koala": "koala",
            "+adversarial": "koala",
            "+lk": "rejection",
            "+tv": "rejection",
            "hass": "likeliest",
        }
        assert wanted.objective == next((each for part, each in objectives.items() if part in method), None)
        if wanted.first is not None:
            assert wanted.first.head in installed(HEADS)
            load_template(wanted.first.tree)
        # Medusa and Hydra draft as deep as they have heads; the others as deep as they are asked to.
        load_template(wanted.tree).check(depth=wanted.options.get("heads", 64), candidates=4096)
    assert preset.data.max_tokens <= preset.training.batch_tokens


@pytest.mark.parametrize("name", ["tiny", *VICUNA])
def test_the_parts_of_koala_are_koala_with_one_thing_left_out(name: str) -> None:
    methods = load_preset(name).methods
    for head in ("medusa", "eagle"):
        koala = methods[f"{head}+koala"]
        assert methods[f"{head}+layers"] == koala.model_copy(
            update={"objective": None, "objective_options": {}, "usual": False}
        )
        assert methods[f"{head}+adversarial"] == koala.model_copy(
            update={"layers": methods[head].layers, "usual": False}
        )
        assert methods[head] == methods[f"{head}+layers"].model_copy(update={"layers": 1, "usual": True})


@pytest.mark.parametrize("name", VICUNA)
def test_the_vicuna_presets_are_the_papers_setting(name: str) -> None:
    preset = load_preset(name)
    assert preset.target.name == f"lmsys/{name}-v1.3"
    assert (preset.target.dtype, preset.target.device, preset.target.chat_template) == (
        "float16",
        "cuda",
        "vicuna_v1.1",
    )
    assert preset.evaluation.questions == "mt_bench"
    usual = [preset.methods[name] for name in usual_methods(preset)[1:]]
    assert {(wanted.head, wanted.tree) for wanted in usual} == {
        ("medusa", "medusa/mc_sim_7b_63"),
        ("eagle", "eagle/mc_sim_7b_63"),
    }


@pytest.mark.parametrize("name", RECIPES)
def test_a_published_recipe_trains_the_original_head_alone_as_koalas_preset_has_it(name: str) -> None:
    preset, method = load_preset(name), RECIPES[name]
    assert usual_methods(preset) == ["vanilla", method]
    own, ours = preset.methods[method], load_preset("vicuna-7b").methods[method]
    assert (own.head, own.layers, own.objective, own.tree) == (ours.head, 1, None, ours.tree)
    assert ours.options.items() <= own.options.items()
    assert preset.target == load_preset("vicuna-7b").target


def test_published_recipes_hold_the_published_values() -> None:
    """As the presets' first lines cite them; whatever is changed here is no longer the authors' recipe."""
    medusa, eagle = load_preset("medusa-1"), load_preset("eagle-1")
    own = medusa.training
    assert (
        own.steps,
        own.micro_batches,
        own.learning_rate,
        own.warmup_fraction,
        own.final_rate_fraction,
        own.weight_decay,
    ) == (537, 128, 1e-3, 0.1, 0, 0)
    assert (medusa.data.max_tokens, medusa.methods["medusa"].options) == (2048, {"heads": 5})
    own = eagle.training
    assert (own.steps, own.micro_batches, own.learning_rate, own.betas, own.weight_decay) == (
        85_000,
        16,
        3e-5,
        (0.9, 0.95),
        0.01,
    )
    assert round(own.warmup_fraction * own.steps) == pytest.approx(2000, abs=3)
    assert own.final_rate_fraction == pytest.approx(1 - 83_000 / 798_000, abs=0.01)
    assert (eagle.data.max_tokens, eagle.data.limit) == (1200, 68_000)
    assert eagle.methods["eagle"].options == {
        "checkpointing": True,
        "noise": 0.2,
        "regression_weight": 1.0,
        "classification_weight": 0.1,
    }
    assert {
        wanted.options.get("kv_heads")
        for wanted in load_preset("vicuna-33b").methods.values()
        if wanted.head == "eagle"
    } == {13}


def test_the_tiny_presets_quick_form_is_smaller() -> None:
    whole, quick = load_preset("tiny"), load_preset("tiny", quick=True)
    assert quick.training.steps < whole.training.steps
    assert quick.evaluation.limit == 1
    assert quick.methods == whole.methods


@pytest.mark.parametrize("name", VICUNA)
def test_a_preset_without_quick_form_says_so(name: str) -> None:
    with pytest.raises(KoalaBenchError, match=rf"{name} has no quick form"):
        load_preset(name, quick=True)


# ------------------------------------------------------------------------------ overrides


@pytest.mark.parametrize(
    ("assignment", "place", "value"),
    [
        ("training.steps=7", "training.steps", 7),
        (" training.steps = 7 ", "training.steps", 7),
        ("training.learning_rate=3e-5", "training.learning_rate", 3e-5),
        ("target.name=org/a-model", "target.name", "org/a-model"),
        ("target.name='org/a-model'", "target.name", "org/a-model"),
        ('target.name="a = b"', "target.name", "a = b"),
        ("target.name=x=y", "target.name", "x=y"),
        ("training.betas=[0.8, 0.9]", "training.betas", (0.8, 0.9)),
        ("evaluation.limit=3", "evaluation.limit", 3),
        ("methods.medusa.options={heads=2}", "methods.medusa.options", {"heads": 2}),
        ("methods.medusa.options.heads=2", "methods.medusa.options", {"heads": 2}),
        ('methods."eagle+koala".layers=3', "methods.eagle+koala.layers", 3),
        ("methods.eagle+koala.layers=3", "methods.eagle+koala.layers", 3),
        (
            'methods."eagle+koala".objective_options.weight=0.0',
            "methods.eagle+koala.objective_options",
            {"discriminator": "feature", "weight": 0.0},
        ),
    ],
)
def test_an_override_sets_one_value(assignment: str, place: str, value: object) -> None:
    found: object = load_preset("tiny", [assignment])
    for part in place.split("."):
        found = found[part] if isinstance(found, dict) else getattr(found, part)
    assert found == value


def test_an_override_may_add_a_method() -> None:
    preset = load_preset(
        "tiny", ["methods.\"my.own\"={head='./own.py:Own', tree='chain-1'}", 'methods."my.own".layers=2']
    )
    assert preset.method("my.own").layers == 2


def test_later_overrides_win_also_over_quick() -> None:
    assert load_preset("tiny", ["training.steps=7", "training.steps=8"], quick=True).training.steps == 8


@pytest.mark.parametrize(
    ("assignment", "words"),
    [
        ("training.stepz=7", "training.stepz: unknown setting. Did you mean steps"),
        ("trainings.steps=7", "trainings: unknown setting. Did you mean training"),
        ("methods.eagle.tre='chain-2'", "methods.eagle.tre: unknown setting. Did you mean tree"),
        ("methods.hawk.layers=2", r"methods\.hawk\.head: Field required"),
        ("training.steps=1.5", r"training\.steps"),
        ("training.steps=0", r"training\.steps"),
        ("training.clip_norm=0", r"training\.clip_norm"),
        ("training.warmup_fraction=1", r"training\.warmup_fraction"),
        ("evaluation.warmup=-1", r"evaluation\.warmup"),
        ("target=5", "target"),
        ("methods=[]", "methods"),
        ("training.steps", "is not an override"),
        ("=7", "is not an override"),
        ("training.steps.deep=7", "goes below a value"),
        ('methods."eagle.layers=7', "is not a key"),
        ('methods."eagle" "x".layers=7', "is not a key"),
        ("a..b=7", "a: unknown setting. "),
    ],
)
def test_a_wrong_override_is_one_clear_error(assignment: str, words: str) -> None:
    with pytest.raises(KoalaBenchError, match=words) as caught:
        load_preset("tiny", [assignment])
    assert "\n" not in str(caught.value)


# ------------------------------------------------------------------------------ the hash


def test_the_hash_is_of_values_not_of_their_order_or_file(small: Path, tmp_path: Path) -> None:
    sections = SMALL.strip().split("\n\n")
    turned = tmp_path / "turned.toml"
    turned.write_text("\n\n".join(reversed(sections)))
    assert load_preset(str(turned)).sha256 == load_preset(str(small)).sha256
    assert load_preset(str(small), ["training.steps=5"]).sha256 == load_preset(str(small)).sha256


def test_the_hash_covers_defaults_but_not_the_quick_form(small: Path) -> None:
    plain = load_preset(str(small)).sha256
    assert load_preset(str(small), ["training.clip_norm=1.0"]).sha256 == plain
    assert load_preset(str(small), ["quick=['training.steps=1']"]).sha256 == plain


@pytest.mark.parametrize(
    "change",
    ["target.revision=main", "training.steps=6", "training.seed=1", "data.limit=5", "evaluation.repeats=2",
        "methods.eagle.layers=2",
     "methods.eagle.tree=chain-3", "methods.eagle.options.noise=0.1"],
)  # fmt: skip
def test_every_value_changes_the_hash(small: Path, change: str) -> None:
    assert load_preset(str(small), [change]).sha256 != load_preset(str(small)).sha256


def test_what_a_record_keeps_of_a_preset_gives_the_same_hash() -> None:
    assert load_preset("tiny").sha256 == Preset.model_validate(load_preset("tiny").model_dump(mode="json")).sha256


# ------------------------------------------------------------------------------ files and names


def test_a_preset_file_is_read_as_it_stands(small: Path) -> None:
    preset = load_preset(str(small))
    assert (preset.target.name, preset.training.steps, preset.methods["eagle"].tree, preset.data.source) == (
        "some/model",
        5,
        "chain-2",
        "bundled",
    )


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"[target", "not valid TOML"),
        (b"\xff\xfe", "Cannot read the preset"),
        (b"", "target: Field required"),
        (SMALL.encode() + b"[extra]\nx = 1\n", "extra: unknown setting"),
    ],
)
def test_a_damaged_preset_file_is_one_clear_error(tmp_path: Path, content: bytes, words: str) -> None:
    path = tmp_path / "bad.toml"
    path.write_bytes(content)
    with pytest.raises(KoalaBenchError, match=words) as caught:
        load_preset(str(path))
    assert "bad.toml" in str(caught.value) and "\n" not in str(caught.value)


def test_unknown_names_are_answered_with_near_ones() -> None:
    with pytest.raises(KoalaBenchError, match="Did you mean vicuna-7b"):
        load_preset("vicuna7b")
    with pytest.raises(KoalaBenchError, match=r"Unknown method 'eagle\+coala'\. Did you mean eagle\+koala"):
        load_preset("tiny").method("eagle+coala")
    with pytest.raises(KoalaBenchError, match="The preset has: vanilla, medusa"):
        load_preset("tiny").method("zzz")


def test_comments_of_the_bundled_files_say_what_was_not_run() -> None:
    for name in VICUNA:
        text = (resources.files("koala_bench") / "presets" / f"{name}.toml").read_text(encoding="utf-8")
        assert "Not run by us" in text
        assert tomllib.loads(text)


# ------------------------------------------------------------------------------ methods that a preset does not list


def test_an_installed_head_becomes_a_method(small: Path) -> None:
    preset, names = with_heads(load_preset(str(small)), ["vanilla", "eagle", "medusa"])
    assert names == ["vanilla", "eagle", "medusa"]
    assert preset.method("medusa") == MethodPreset(head="medusa", tree="chain-2")
    assert preset.method("eagle") == load_preset(str(small)).method("eagle")


def test_an_objective_brings_its_usual_settings() -> None:
    preset, names = with_heads(load_preset("tiny"), ["heads.eagle:Eagle", "heads.eagle:Eagle+koala"])
    assert names == ["Eagle", "Eagle+koala"]
    assert preset.method("Eagle") == MethodPreset(head="heads.eagle:Eagle", tree="small/4")
    wanted = MethodPreset(
        head="heads.eagle:Eagle", layers=2, objective="koala", objective_options={"weight": 0.1}, tree="small/4"
    )  # what all its methods agree on
    assert preset.method("Eagle+koala") == wanted
    assert preset.sha256 != load_preset("tiny").sha256


def test_a_listed_head_gets_an_objective_with_its_own_settings(small: Path) -> None:
    listed = load_preset(str(small), ["methods.eagle.options={noise=0.1}", "methods.eagle.learning_rate=1e-4"])
    method = with_heads(listed, ["eagle+koala"])[0].method("eagle+koala")
    assert (method.head, method.objective, method.options, method.tree, method.learning_rate) == (
        "eagle",
        "koala",
        {"noise": 0.1},
        "chain-2",
        1e-4,
    )


def test_options_reach_the_added_methods_alone(small: Path) -> None:
    preset = with_heads(load_preset(str(small)), ["medusa"], layers=3, tree="2x1")[0]
    assert (preset.method("medusa").layers, preset.method("medusa").tree) == (3, "2x1")
    assert preset.method("eagle").layers == 1


def test_a_head_that_drafts_less_deep_gets_a_smaller_tree(tmp_path: Path) -> None:
    code = "import torch\nclass Head(torch.nn.Module):\n    max_depth = {}\n    def __init__(self, spec): pass\n"
    for depth, tree in ((1, "3"), (2, "small/4")):
        (tmp_path / "shallow.py").write_text(code.format(depth))
        method = with_heads(load_preset("tiny"), [f"{tmp_path}/shallow.py:Head+koala"])[0].method("Head+koala")
        assert (method.tree, method.layers) == (tree, 1)


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (["heads.hawk:Hawk"], "no module 'heads.hawk'"),
        (["./none.py:Head"], "no file"),
        (["eagle+coala"], "Unknown objective 'coala'. Did you mean koala"),
        (["heads.eagle:Eagle+"], "Unknown objective ''"),
        (["heads.eagle:Eagle", "heads.medusa:Medusa", "{}:Eagle"], "There is a method 'Eagle' besides"),
    ],
)
def test_a_head_that_is_none_is_one_clear_error(tmp_path: Path, names: list[str], words: str) -> None:
    (tmp_path / "other.py").write_text("class Eagle:\n    max_depth = 2\n    def __init__(self, spec): pass\n")
    with pytest.raises(KoalaBenchError, match=words.replace("+", r"\+")):
        with_heads(load_preset("tiny"), [name.format(tmp_path / "other.py") for name in names])


def test_an_unknown_name_is_left_to_those_who_ask_for_it() -> None:
    preset, names = with_heads(load_preset("tiny"), ["eagel", "zzz+koala"])
    assert names == ["eagel", "zzz+koala"] and preset == load_preset("tiny")


# ----------------------------------------------------------------------------------------- one head for several methods


def test_a_method_with_another_ones_head_has_its_settings(small: Path) -> None:
    preset = load_preset(
        str(small), ["methods.eagle.layers=3", "methods.wide.head_of=eagle", "methods.wide.tree='4x2'"]
    )
    eagle, wide = preset.methods["eagle"], preset.methods["wide"]
    assert wide == eagle.model_copy(update={"head_of": "eagle", "tree": "4x2"})
    assert (preset.trained_as("wide"), preset.trained_as("eagle")) == ("eagle", "eagle")
    same_tree = load_preset(str(small), ["methods.same.head_of=eagle"])
    assert same_tree.methods["same"].tree == "chain-2"
    assert Preset.model_validate(preset.model_dump(mode="json")) == preset, "what a record keeps can be read again"


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["methods.wide.head_of=eagel"], "wide: head_of is 'eagel', which is no method with a head of its own"),
        (
            ["methods.wide.head_of=eagle", "methods.wider.head_of=wide"],
            "wider: head_of is 'wide', which is no method with a head of its own",
        ),
        (
            ["methods.wide.head_of=eagle", "methods.wide.layers=2"],
            "wide decodes with the head of eagle and has another layers",
        ),
        (["methods.wide.head_of=3"], "wide: head_of is 3, which is no method with a head of its own"),
        (["evaluation.top_k=5"], "evaluation: top_k and top_p cut a distribution, and temperature 0 has none"),
        (["evaluation.temperature=-1"], "evaluation.temperature: Input should be greater than or equal to 0"),
        (["evaluation.top_p=0"], "evaluation.top_p: Input should be greater than 0"),
    ],
)
def test_what_does_not_fit_together_is_named(small: Path, more: list[str], said: str) -> None:
    with pytest.raises(KoalaBenchError) as refused:
        load_preset(str(small), more)
    assert said in refused.value.message


def test_a_preset_based_on_another_holds_what_differs(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text('based_on = "vicuna-33b"\n[target]\nname = "mine"\n[methods]\neagle.options.kv_heads = 4\n')
    mine, base = load_preset(str(path)), load_preset("vicuna-33b")
    assert mine.target == base.target.model_copy(update={"name": "mine"})
    assert mine.method("eagle").options == {"checkpointing": True, "kv_heads": 4}
    assert mine.method("eagle+lk") == base.method("eagle+lk")
    assert list(mine.methods) == list(base.methods)


@pytest.mark.parametrize("base", ["'{here}'", "3", "'vicuna-8b'"])
def test_a_base_that_is_none_is_one_clear_error(tmp_path: Path, base: str) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(f"based_on = {base.format(here=path)}\n")
    with pytest.raises(KoalaBenchError, match=r"based on|Unknown preset 'vicuna-8b'"):
        load_preset(str(path))
