"""Parity with recordings of the official code, and with a folder of other sizes that a naive reference records here."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, LlamaModel

from koala_bench import decoding
from koala_bench.acceptance import Accepted, greedy
from koala_bench.decoding import VANILLA_TREE, Vanilla, decode
from koala_bench.errors import KoalaBenchError
from koala_bench.interop import eagle, medusa
from koala_bench.interop.checkpoints import make_head
from koala_bench.parity import PARTS, Check, check, ok, report
from koala_bench.registry import HEADS, build
from koala_bench.target import load_target
from koala_bench.tree import DraftTree, TreeTemplate

FOLDER = Path(os.environ.get("KOALA_BENCH_FIXTURES") or Path(__file__).parents[2] / "shared" / "fixtures")

needs_recordings = pytest.mark.skipif(not FOLDER.is_dir(), reason="no recordings of the official code; set KOALA_BENCH_FIXTURES")


def _statuses(checks: Sequence[Check]) -> dict[str, str]:
    return {each.name: each.status for each in checks}


def _failed(checks: Sequence[Check]) -> list[Check]:
    return [each for each in checks if each.status == "fail"]


def _copy(parts: Sequence[str], to: Path) -> Path:
    for part in parts:
        shutil.copytree(FOLDER / part, to / part)
    return to


def _rewrite(path: Path, change: Callable[[Any], None]) -> None:
    """Change a copied JSON or safetensors file."""
    contents = load_file(path) if path.suffix == ".safetensors" else json.loads(path.read_text())
    change(contents)
    if path.suffix == ".safetensors":
        save_file(contents, path)
    else:
        path.write_text(json.dumps(contents))


# ------------------------------------------------------------------------------ the official recordings


@needs_recordings
def test_everything_that_is_supported_agrees_with_the_official_code() -> None:
    checks = check(FOLDER)
    assert not _failed(checks), report(checks)
    assert not [each for each in checks if each.status == "skip"]
    assert {each.name for each in checks if each.status == "unsupported"} == {
        "medusa_decode/typical",
        "eagle_decode/decode_eagle2",
        "losses/medusa/shared_lm_head_version2",
    }
    assert len([each for each in checks if each.status == "pass"]) >= 40


@needs_recordings
def test_a_perturbed_weight_fails_by_name(tmp_path: Path) -> None:
    folder = _copy(["medusa_tiny"], tmp_path)
    _rewrite(folder / "medusa_tiny/heads_layers2/medusa_lm_head.safetensors", lambda tensors: tensors["1.0.linear.weight"][0, 0].add_(0.1))
    checks = check(folder)
    assert [each.name for each in _failed(checks)] == ["medusa_tiny/medusa_logits/layers2"]
    assert not ok(checks)
    assert "1 failed" in report(checks).splitlines()[-1]


@needs_recordings
def test_a_changed_decision_fails_with_the_place_of_it(tmp_path: Path) -> None:
    folder = _copy(["medusa_decode"], tmp_path)

    def change(recorded: Any) -> None:
        recorded["prompts"][1]["steps"][3]["tree_tokens"][5] += 1
        recorded["eos_cases"][0]["accept_lengths"][0] += 1

    _rewrite(folder / "medusa_decode/decode.json", change)
    (folder / "medusa_decode/typical.json").unlink()
    failed = {each.name: each.detail for each in _failed(check(folder))}
    assert set(failed) == {"medusa_decode/tree_tokens", "medusa_decode/eos_cases"}
    assert failed["medusa_decode/tree_tokens"].startswith("prompt 1, entry 3")


@needs_recordings
def test_missing_parts_and_files_are_skipped_by_name(tmp_path: Path) -> None:
    folder = _copy(["medusa_tiny", "losses"], tmp_path)
    shutil.rmtree(folder / "medusa_tiny/heads_layers1")
    skipped = {each.name: each.detail for each in check(folder) if each.status == "skip"}
    assert skipped == {
        "medusa_tiny/medusa_logits/layers1": "medusa_tiny/heads_layers1 is absent",
        "medusa_decode": "medusa_decode is absent",
        "eagle_tiny": "eagle_tiny is absent",
        "eagle_decode": "eagle_decode is absent",
        "losses/medusa": "medusa_decode/target, medusa_decode/heads is absent",
        "losses/eagle": "medusa_decode/target, eagle_decode/draft is absent",
    }


@needs_recordings
@pytest.mark.parametrize(
    ("file", "damage"),
    [
        ("medusa_tiny/expected.safetensors", lambda data: data[: len(data) // 2]),
        ("medusa_tiny/heads_layers1/medusa_lm_head.safetensors", lambda data: b"\xff" + data[1:]),
        ("medusa_tiny/target/model.safetensors", lambda data: data[:100]),
        ("medusa_tiny/target/config.json", lambda data: data[: len(data) // 2]),
        ("medusa_tiny/heads_layers1/config.json", lambda data: b"[]"),
    ],
)
def test_a_damaged_file_is_one_line_that_names_it(tmp_path: Path, file: str, damage: Callable[[bytes], bytes]) -> None:
    path = _copy(["medusa_tiny"], tmp_path) / file
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(KoalaBenchError) as caught:
        check(tmp_path)
    assert "\n" not in str(caught.value)
    assert Path(file).parent.name in str(caught.value) or Path(file).name in str(caught.value)


@needs_recordings
def test_a_field_that_is_missing_is_named(tmp_path: Path) -> None:
    folder = _copy(["medusa_decode"], tmp_path)
    _rewrite(folder / "medusa_decode/decode.json", lambda recorded: recorded["prompts"][0].pop("accept_lengths"))
    with pytest.raises(KoalaBenchError, match=r"decode.json has no 'accept_lengths'"):
        check(folder)


def test_a_folder_without_recordings_is_refused(tmp_path: Path) -> None:
    with pytest.raises(KoalaBenchError, match="There is no folder"):
        check(tmp_path / "nowhere")
    with pytest.raises(KoalaBenchError, match="holds none of medusa_tiny"):
        check(tmp_path)


@needs_recordings
def test_a_rope_base_that_branch_v1_ignores_is_noticed(tmp_path: Path) -> None:
    folder = _copy(["medusa_tiny", "eagle_tiny"], tmp_path)
    _rewrite(folder / "eagle_tiny/draft/config.json", lambda config: config.update(rope_theta=500000.0))
    found = {each.name: each for each in check(folder)}
    assert found["eagle_tiny/out_features"].status == "pass"
    assert "with RoPE base 10000" in found["eagle_tiny/out_features"].detail


@needs_recordings
@pytest.mark.parametrize("kind", ["medusa", "eagle"])
def test_recorded_prompts_decode_to_vanillas_tokens_in_float64(kind: str) -> None:
    target = load_target(str(FOLDER / "medusa_decode/target"), "cpu", "float64", tokenizer=False)
    reader, folder, key = (medusa.read, "medusa_decode/heads", "medusa_choices") if kind == "medusa" else (eagle.read, "eagle_decode/draft", "tree_choices")
    head = make_head(reader(FOLDER / folder, target.spec()), target.spec())
    buffers = json.loads((FOLDER / f"{kind}_decode/buffers.json").read_text())
    template = TreeTemplate.of(kind, buffers[key])
    for entry in json.loads((FOLDER / f"{kind}_decode/decode.json").read_text())["prompts"]:
        limit = len(entry["generated_ids"])
        ours = decode(target, head, template, entry["prompt_ids"], limit, ())
        assert ours.tokens == decode(target, Vanilla(), VANILLA_TREE, entry["prompt_ids"], limit, ()).tokens == entry["generated_ids"]
        assert sum(ours.accepted) > len(ours.accepted)  # the head is of use


# ------------------------------------------------------------------------------ padding


def _padded_rows(template: TreeTemplate) -> list[list[int]]:
    paths = [list(path) for path in reversed(template.shape.leaf_paths)]
    return [path + [-1] * (max(map(len, paths)) - len(path)) for path in paths]


def _official_greedy(tokens: torch.Tensor, logits: torch.Tensor, rows: list[list[int]]) -> list[int]:
    """Medusa's own rule: every leaf path is padded to the longest, padding is token 0, and it is compared like a token."""
    index = torch.tensor(rows)
    candidates = torch.cat([tokens, tokens.new_zeros(1)])[index]  # -1 is the zero behind the last node
    own = logits[index].argmax(-1)  # -1 is the last node
    right = (candidates[:, 1:] == own[:, :-1]).int().cumprod(1).sum(1)
    best = int(right.argmax())
    return rows[best][: int(right[best]) + 1]


def test_padding_is_never_accepted_where_the_target_says_token_0_after_a_shallow_leaf() -> None:
    template = TreeTemplate.of("uneven", [[0], [1], [0, 0], [0, 0, 0]])  # the leaf (1) is two levels short of the deepest
    tokens = torch.tensor([5, 3, 4, 6, 7])
    logits = F.one_hot(torch.tensor([4, 6, 0, 7, 0]), 9).float()  # the target says 4, then 0
    official = _official_greedy(tokens, logits, _padded_rows(template))
    assert official == [0, 2, -1, -1]  # node 2, then two paddings taken for the token 0
    assert greedy(DraftTree(tokens, template.shape), logits) == Accepted((0, 2), [4, 0])


@needs_recordings
def test_recorded_cases_of_accepted_padding_end_in_the_leaf_before_it() -> None:
    template = TreeTemplate.of("recorded", json.loads((FOLDER / "medusa_decode/buffers.json").read_text())["medusa_choices"])
    tensors = load_file(FOLDER / "medusa_decode/typical.safetensors")
    cases = json.loads((FOLDER / "medusa_decode/typical.json").read_text())["cases"]
    padded = 0
    for case in cases:
        tokens, logits = tensors[f"case{case['case']}.node_tokens"], tensors[f"case{case['case']}.node_logits"]
        official, ours = _official_greedy(tokens, logits, _padded_rows(template)), greedy(DraftTree(tokens, template.shape), logits).path
        assert official == case["greedy"]["path_nodes"]
        assert list(ours) == [node for node in official if node >= 0]
        padded += -1 in official
    assert padded == sum(case["padding_accepted"] for case in cases) > 0


def test_decoding_stays_lossless_where_the_target_often_says_token_0(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=64,
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            intermediate_size=64,
            max_position_embeddings=256,
            initializer_range=0.4,
        )
    )
    with torch.no_grad():
        states = model.model(torch.randint(64, (8, 32))).last_hidden_state
        model.lm_head.weight[0] += 1.5 * F.normalize(states.mean((0, 1)), dim=0) + 0.5 * states[:, -1].mean(0)
    model.save_pretrained(tmp_path)
    target = load_target(str(tmp_path), "cpu", "float64", tokenizer=False)
    head = build(HEADS, "medusa", target.spec(), {"heads": 4}).double().eval()
    # The wide first level makes some drafts right by chance, and most of its nodes are leaves far above the deepest.
    template = TreeTemplate.of("uneven", [*([rank] for rank in range(40)), [0, 0], [0, 0, 0], [0, 0, 0, 0], [1, 0], [2, 0]])
    judged: list[list[int]] = []

    def watched(tree: DraftTree, logits: torch.Tensor) -> Accepted:
        if tree.shape is template.shape:
            judged.append(_official_greedy(tree.tokens, logits, _padded_rows(template)))
        return greedy(tree, logits)

    monkeypatch.setattr(decoding, "greedy", watched)
    zeros = 0
    for seed in range(4):
        prompt = torch.randint(64, (7,), generator=torch.Generator().manual_seed(seed)).tolist()
        ours = decode(target, head, template, prompt, 40, ())
        vanilla = decode(target, Vanilla(), VANILLA_TREE, prompt, 40, ())
        assert ours.tokens == vanilla.tokens
        zeros += vanilla.tokens.count(0)
    assert 10 < zeros < 150
    assert any(-1 in path for path in judged)  # the official rule would have kept rows of padding


# ------------------------------------------------------------------------------ a reference of other sizes

WIDTH, VOCAB, EOS = 24, 20, 7
MEDUSA_TREE = [[0], [1], [2], [3], [4], [5], [6], [7], [0, 0], [0, 1], [1, 0], [2, 1], [2, 0], [5, 0], [0, 0, 0], [2, 0, 0], [2, 0, 1]]
EAGLE_TREE = [[0], [1], [2], [3], [4], [5], [0, 0], [0, 3], [0, 9], [1, 0], [1, 2], [0, 0, 0], [0, 3, 1], [0, 0, 0, 2]]
WRONGLY_DRAFTED_TREE = [[0], [1], [2], [3], [0, 0], [1, 0], [1, 1], [1, 0, 0]]  # (0) grows leaves only, (1) more


class _Net(nn.Module):
    """EAGLE's network from stock parts: a Llama without its embedding, its last norm and the first layer's input norm."""

    def __init__(self, config: LlamaConfig, embed: nn.Embedding, bias: bool) -> None:
        super().__init__()
        self.fc = nn.Linear(2 * WIDTH, WIDTH, bias=bias)
        self.model = LlamaModel(config)
        self.model.layers[0].input_layernorm = nn.Identity()
        self.model.norm = nn.Identity()
        self.model.embed_tokens = None
        self.embed = [embed]

    def forward(self, ids: torch.Tensor, states: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        found = self.model(inputs_embeds=self.fc(torch.cat([self.embed[0](ids), states], -1)), attention_mask=mask, use_cache=False)
        return found.last_hidden_state

    def tensors(self) -> dict[str, torch.Tensor]:
        own = {f"fc.{name}": p for name, p in self.fc.named_parameters()}
        return own | {name: p for name, p in self.model.named_parameters() if not name.startswith(("embed", "norm"))}


class _Guesser(nn.Module):
    """A Medusa head as upstream builds it: one block, applied several times."""

    def __init__(self, layers: int) -> None:
        super().__init__()
        self.block, self.layers, self.out = nn.Linear(WIDTH, WIDTH), layers, nn.Linear(WIDTH, VOCAB, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for _ in range(self.layers):
            x = x + F.silu(self.block(x))
        return self.out(x)


def _medusa_file(guessers: Sequence[_Guesser], folder: Path, dtype: torch.dtype) -> None:
    """Write the heads as upstream does, in a dtype that their weights are then rounded to."""
    tensors = {}
    for i, guesser in enumerate(guessers):
        guesser.to(dtype).float()
        for block in range(guesser.layers):
            tensors[f"{i}.{block}.linear.weight"], tensors[f"{i}.{block}.linear.bias"] = (
                guesser.block.weight.detach().to(dtype),
                guesser.block.bias.detach().to(dtype),
            )
        tensors[f"{i}.{guesser.layers}.weight"] = guesser.out.weight.detach().to(dtype)
    folder.mkdir()
    torch.save(tensors, folder / "medusa_lm_head.pt")
    (folder / "config.json").write_text(json.dumps({"medusa_num_heads": 2, "medusa_num_layers": 1}))  # wrong, as in released ones


class _Recorder:
    """Computes everything by whole passes over whole sequences: no cache, no tree attention."""

    def __init__(self, folder: Path, eagle_tree: list[list[int]]) -> None:
        torch.manual_seed(3)
        self.folder = folder
        config = LlamaConfig(
            vocab_size=VOCAB, hidden_size=WIDTH, num_hidden_layers=2, num_attention_heads=6, num_key_value_heads=2, intermediate_size=40,
            max_position_embeddings=96, rope_theta=3000.0, initializer_range=0.3, tie_word_embeddings=True, eos_token_id=EOS, rms_norm_eps=1e-5,
        )  # fmt: skip
        self.model = LlamaForCausalLM(config).eval().requires_grad_(False)
        for part in PARTS:
            (folder / part).mkdir()
        for part in ("medusa_tiny", "medusa_decode"):
            self.model.save_pretrained(folder / part / "target")
        self.prompts = [torch.randint(VOCAB, (n,)) for n in (3, 11)]
        self.guessers = [_Guesser(2) for _ in range(3)]
        draft = {
            "vocab_size": VOCAB, "hidden_size": WIDTH, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
            "intermediate_size": 56, "rms_norm_eps": 1e-3, "rope_theta": 700.0, "hidden_act": "silu", "max_position_embeddings": 96,
        }  # fmt: skip
        self.net = _Net(LlamaConfig(**draft, initializer_range=0.3), self.model.get_input_embeddings(), bias=False)
        self.draft = draft | {"bias": False}
        self.tops = {"medusa": sorted(map(tuple, MEDUSA_TREE), key=lambda p: (len(p), p)), "eagle": sorted(map(tuple, eagle_tree), key=lambda p: (len(p), p))}

    def states(self, ids: torch.Tensor) -> torch.Tensor:
        return self.model.model(ids if ids.ndim == 2 else ids[None]).last_hidden_state.view(*ids.shape, WIDTH)

    def write_draft(self, part: str, pickled: bool) -> None:
        (self.folder / part / "draft").mkdir()
        (self.folder / part / "draft/config.json").write_text(json.dumps(self.draft))
        tensors = {
            "embed_tokens.weight": self.model.get_input_embeddings().weight.detach().clone(),
            **{name: p.detach() for name, p in self.net.tensors().items()},
        }
        if pickled:
            torch.save(tensors, self.folder / part / "draft/pytorch_model.bin")
        else:
            save_file(tensors, self.folder / part / "draft/model.safetensors")

    @torch.no_grad()
    def medusa_tiny(self) -> None:
        expected: dict[str, torch.Tensor] = {}
        for layers, dtype in ((1, torch.bfloat16), (3, torch.float32)):
            guessers = [_Guesser(layers) for _ in range(5)]
            _medusa_file(guessers, self.folder / f"medusa_tiny/heads_layers{layers}", dtype)
            for i, prompt in enumerate(self.prompts):
                states = self.states(prompt)
                expected[f"prompt{i}.input_ids"] = prompt.int()
                expected[f"prompt{i}.hidden_states"] = states.contiguous()
                expected[f"prompt{i}.base_logits"] = self.model.lm_head(states)
                expected[f"prompt{i}.layers{layers}.medusa_logits"] = torch.stack([guesser(states) for guesser in guessers])
        save_file(expected, self.folder / "medusa_tiny/expected.safetensors")

    def medusa_draft(self, ids: torch.Tensor, root: int) -> list[int]:
        best = [guesser(self.states(ids)[-1]).topk(10).indices.tolist() for guesser in self.guessers]
        return [root, *(best[len(path) - 1][path[-1]] for path in self.tops["medusa"])]

    def eagle_tables(self, ids: torch.Tensor, states: torch.Tensor) -> tuple[list[int], list[torch.Tensor]]:
        """Tree tokens and, for each inner node, its logits."""
        paths = self.tops["eagle"]
        inner = [(), *(path for path in paths if any(other[:-1] == path for other in paths))]
        features: dict[tuple[int, ...], torch.Tensor] = {}
        tokens: dict[tuple[int, ...], int] = {(): int(ids[-1])}
        logits = []
        for path in inner:
            above = [path[:depth] for depth in range(len(path) + 1)]
            extended = torch.cat([ids, ids.new_tensor([tokens[each] for each in above[1:]])])
            states_read = torch.stack([*states, *(features[each] for each in above[:-1])])
            features[path] = self.net(extended[None], states_read[None])[0, -1]
            logits.append(self.model.lm_head(features[path]))
            for rank, token in enumerate(logits[-1].topk(10).indices.tolist()):
                tokens[(*path, rank)] = token
        return [tokens[path] for path in [(), *paths]], logits

    def eagle_draft(self, ids: torch.Tensor, root: int) -> list[int]:
        return self.eagle_tables(torch.cat([ids[1:], torch.tensor([root])]), self.states(ids))[0]

    @torch.no_grad()
    def eagle_tiny(self) -> None:
        expected: dict[str, torch.Tensor] = {}
        self.write_draft("eagle_tiny", pickled=False)
        for i, prompt in enumerate(self.prompts):
            states = self.states(prompt)
            shifted = torch.cat([prompt[1:], self.model.lm_head(states[-1]).argmax()[None]])
            features = self.net(shifted[None], states[None])[0]
            tokens, tables = self.eagle_tables(shifted, states)
            best = torch.stack(tables).topk(10)
            found = {"input_ids": prompt, "hidden_states": states, "shifted_ids": shifted, "out_features": features, "out_logits": self.model.lm_head(features)}
            found |= {"tree_tokens": torch.tensor(tokens), "tree_topk_tokens": best.indices, "tree_topk_logits": best.values}
            expected |= {f"prompt{i}.{name}": tensor.contiguous() for name, tensor in found.items()}
        save_file(expected, self.folder / "eagle_tiny/expected.safetensors")

    def rows(self, kind: str) -> list[list[int]]:
        paths = self.tops[kind]
        leaves = [path for path in paths if not any(other[:-1] == path for other in paths)]
        rows = [[0, *(1 + paths.index(path[: depth + 1]) for depth in range(len(path)))] for path in reversed(leaves)]
        width = max(map(len, rows))
        rows = [row + [-1] * (width - len(row)) for row in rows]
        return sorted(rows, key=lambda row: [999 if node < 0 else node for node in row]) if kind == "eagle" else rows

    def buffers(self, kind: str) -> dict[str, Any]:
        paths = [(), *self.tops[kind]]
        inner = [path for path in paths if any(other[:-1] == path and other for other in paths)]
        above = {"medusa": lambda path: len(path) - 1, "eagle": lambda path: inner.index(path[:-1])}[kind]
        prefix, key = ("medusa", "medusa_choices") if kind == "medusa" else ("tree", "tree_choices")
        mask = [[int(row[: len(column)] == column) for column in paths] for row in paths]
        indices = [0, *(path[-1] + 10 * above(path) + 1 for path in paths[1:])]
        shuffled = [list(path) for path in reversed(self.tops[kind])]
        names = {"mask": f"{prefix}_attn_mask", "depths": "medusa_position_ids" if kind == "medusa" else "tree_position_ids"}
        return {
            "tree": "some other",
            key: shuffled,
            names["mask"]: mask,
            "tree_indices": indices,
            names["depths"]: list(map(len, paths)),
            "retrieve_indices": self.rows(kind),
        }

    def generate(self, kind: str, prompt: torch.Tensor, stop: Callable[[list[int]], bool]) -> dict[str, Any]:
        draft = self.medusa_draft if kind == "medusa" else self.eagle_draft
        rows, ids, steps = self.rows(kind), prompt, []
        root = int(self.model.lm_head(self.states(ids)[-1]).argmax())
        while True:
            tokens = draft(ids, root)
            batch = torch.stack([torch.cat([ids, torch.tensor([tokens[max(node, 0)] for node in row])]) for row in rows])
            own = self.model.lm_head(self.states(batch)[:, len(ids) :]).argmax(-1).tolist()
            lengths = [
                next(i for i in range(len(row)) if i + 1 == len(row) or row[i + 1] < 0 or tokens[row[i + 1]] != own[at][i]) for at, row in enumerate(rows)
            ]
            best = lengths.index(max(lengths))
            path = rows[best][: lengths[best] + 1]
            accepted = [tokens[node] for node in path]
            steps.append({"tree_tokens": tokens, "best_candidate": best, "path_nodes": path, "accepted_tokens": accepted, "accept_length": len(path) - 1})
            ids, root = torch.cat([ids, torch.tensor(accepted)]), own[best][lengths[best]]
            if stop(accepted):
                generated = ids[len(prompt) :].tolist()
                return {"prompt_ids": prompt.tolist(), "generated_ids": generated, "accept_lengths": [step["accept_length"] for step in steps], "steps": steps}

    @torch.no_grad()
    def decode(self, kind: str) -> None:
        part = self.folder / f"{kind}_decode"
        if kind == "medusa":
            _medusa_file(self.guessers, part / "heads", torch.float16)
        else:
            self.write_draft(part.name, pickled=True)
        (part / "buffers.json").write_text(json.dumps(self.buffers(kind)))
        entries, ends = [], []
        for prompt in self.prompts:
            left = [14]
            entries.append(self.generate(kind, prompt, lambda accepted, left=left: left.append(left.pop() - len(accepted)) or left[0] <= 0))
            for at in (0, 4, 9):
                eos = entries[-1]["generated_ids"][at]
                ends.append({**self.generate(kind, prompt, lambda accepted, eos=eos: eos in accepted), "eos_token_id": eos})
        (part / "decode.json").write_text(json.dumps({"eos_token_id": EOS, "prompts": entries, "eos_cases": ends}))

    def losses(self) -> None:
        lengths, width = (9, 14, 6), 14
        ids = torch.stack([F.pad(torch.randint(1, VOCAB, (n,)), (0, width - n)) for n in lengths])
        mask = torch.stack([torch.arange(width) < n for n in lengths])
        labels = torch.where(mask & (torch.arange(width) % 5 > 0), ids, -100)
        save_file({"input_ids": ids, "attention_mask": mask.long(), "labels": labels}, self.folder / "losses/medusa_batch.safetensors")
        logits = [guesser(self.states(ids)) for guesser in self.guessers]
        pairs = [(each[:, : -2 - i].flatten(0, 1), labels[:, 2 + i :].flatten()) for i, each in enumerate(logits)]
        each_loss = [F.cross_entropy(ours, wanted, ignore_index=-100) for ours, wanted in pairs]
        sum(each_loss).backward()
        norms = {}
        for i, guesser in enumerate(self.guessers):
            norms |= {f"{i}.0.linear.weight": float(guesser.block.weight.grad.norm()), f"{i}.0.linear.bias": float(guesser.block.bias.grad.norm())}
            norms[f"{i}.{guesser.layers}.weight"] = float(guesser.out.weight.grad.norm())
        right = [float((ours.argmax(-1) == wanted)[wanted != -100].float().mean()) for ours, wanted in pairs]
        found = {
            "total_loss": float(sum(each_loss).detach()),
            "per_head_loss": [float(each.detach()) for each in each_loss],
            "per_head_top1": right,
            "grad_l2_norms": norms,
        }
        (self.folder / "losses/medusa_loss.json").write_text(json.dumps({"ignore_index": -100, "per_head_linear": found}))

        states = [self.states(ids[i, :n]) for i, n in enumerate(lengths)]
        counted = [(torch.arange(n) > 2).long() for n in lengths]
        counted[1][-3:] = 0  # one dialogue ends with something that is no answer
        tensors = {}
        for i, n in enumerate(lengths):
            tensors |= {f"item{i}.input_ids": ids[i, :n].clone(), f"item{i}.hidden_state": states[i].contiguous(), f"item{i}.loss_mask": counted[i]}
        shifted = torch.stack([F.pad(ids[i, 1:n], (0, width - n + 1)) for i, n in enumerate(lengths)])
        hidden = torch.stack([F.pad(each, (0, 0, 0, width - len(each))) for each in states])
        wanted = torch.stack([F.pad(each[1:], (0, 0, 0, width - len(each) + 1)) for each in states])
        rows = torch.stack([F.pad(each[:-1], (0, width - len(each) + 1)) for each in counted])
        predict = self.net(shifted, hidden, mask.long())
        count = rows.sum() + 1e-5
        vloss = (F.smooth_l1_loss(predict, wanted, reduction="none").mean(-1) * rows).sum() / count
        soft = torch.softmax(self.model.lm_head(wanted), -1)
        ploss = -((soft * torch.log_softmax(self.model.lm_head(predict), -1)).sum(-1) * rows).sum() / count
        self.net.zero_grad()
        (0.7 * vloss + 0.3 * ploss).backward()
        norms = {name: float(p.grad.norm()) for name, p in self.net.tensors().items()}
        scalars = {"vloss": float(vloss.detach()), "ploss": float(ploss.detach()), "loss": float((0.7 * vloss + 0.3 * ploss).detach())}
        (self.folder / "losses/eagle_loss.json").write_text(
            json.dumps({**scalars, "v_w": 0.7, "p_w": 0.3, "num_unmasked_positions": int(rows.sum()), "grad_l2_norms": norms})
        )
        tensors |= {
            "batch.input_ids": shifted,
            "batch.hidden_states": hidden,
            "batch.attention_mask": mask.long(),
            "batch.loss_mask": rows,
            "predict": predict.detach(),
        }
        save_file(tensors, self.folder / "losses/eagle.safetensors")


def test_a_folder_of_other_sizes_agrees_with_a_naive_reference(tmp_path: Path) -> None:
    recorder = _Recorder(tmp_path, EAGLE_TREE)
    recorder.medusa_tiny()
    recorder.decode("medusa")
    recorder.eagle_tiny()
    recorder.decode("eagle")
    recorder.losses()
    checks = check(tmp_path)
    assert not _failed(checks), report(checks)
    assert {name for name, status in _statuses(checks).items() if status != "pass"} == {"medusa_decode/typical"}
    assert "RoPE base" not in report(checks)  # the draft's own base was used, and fits
    lengths = [
        length
        for kind in ("medusa", "eagle")
        for entry in json.loads((tmp_path / f"{kind}_decode/decode.json").read_text())["prompts"]
        for length in entry["accept_lengths"]
    ]
    assert {0, 1, 2} <= set(lengths)  # the recordings do hold accepted drafts


def test_a_tree_that_upstream_drafts_wrongly_is_unsupported_but_its_text_is_checked(tmp_path: Path) -> None:
    recorder = _Recorder(tmp_path, WRONGLY_DRAFTED_TREE)
    recorder.decode("eagle")
    statuses = _statuses(check(tmp_path))
    assert statuses["eagle_decode/tree_tokens"] == "pass"

    def change(recorded: Any) -> None:
        recorded["prompts"][0]["steps"][0]["tree_tokens"][-1] += 1
        recorded["prompts"][1]["generated_ids"][2] += 1

    _rewrite(tmp_path / "eagle_decode/decode.json", change)
    statuses = _statuses(check(tmp_path))
    assert (statuses["eagle_decode/tree_tokens"], statuses["eagle_decode/generated_ids"]) == ("unsupported", "fail")
