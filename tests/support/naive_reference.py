"""Fixtures recorded here by a naive reference of other sizes than the official recordings, for the tests of parity."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, LlamaModel

from koala_bench.parity import PARTS

WIDTH, VOCAB, EOS = 24, 20, 7
MEDUSA_TREE = [
    [0],
    [1],
    [2],
    [3],
    [4],
    [5],
    [6],
    [7],
    [0, 0],
    [0, 1],
    [1, 0],
    [2, 1],
    [2, 0],
    [5, 0],
    [0, 0, 0],
    [2, 0, 0],
    [2, 0, 1],
]
EAGLE_TREE = [[0], [1], [2], [3], [4], [5], [0, 0], [0, 3], [0, 9], [1, 0], [1, 2], [0, 0, 0], [0, 3, 1], [0, 0, 0, 2]]
WRONGLY_DRAFTED_TREE = [[0], [1], [2], [3], [0, 0], [1, 0], [1, 1], [1, 0, 0]]  # (0) grows leaves only, (1) more


class _Net(nn.Module):
    """EAGLE's network from stock parts: a Llama without embedding, final norm and the first layer's input norm."""

    def __init__(self, config: LlamaConfig, embed: nn.Embedding, bias: bool) -> None:
        super().__init__()
        self.fc = nn.Linear(2 * WIDTH, WIDTH, bias=bias)
        self.model = LlamaModel(config)
        self.model.layers[0].input_layernorm = nn.Identity()
        self.model.norm = nn.Identity()
        self.model.embed_tokens = None
        self.embed = [embed]

    def forward(self, ids: torch.Tensor, states: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        found = self.model(
            inputs_embeds=self.fc(torch.cat([self.embed[0](ids), states], -1)), attention_mask=mask, use_cache=False
        )
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
    (folder / "config.json").write_text(
        json.dumps({"medusa_num_heads": 2, "medusa_num_layers": 1})
    )  # wrong, as in released ones


class Recorder:
    """Computes everything by whole passes over whole sequences: no cache, no tree attention."""

    def __init__(self, folder: Path, eagle_tree: list[list[int]]) -> None:
        torch.manual_seed(3)
        self.folder = folder
        config = LlamaConfig(
            vocab_size=VOCAB, hidden_size=WIDTH, num_hidden_layers=2, num_attention_heads=6, num_key_value_heads=2,
            intermediate_size=40, max_position_embeddings=96, rope_theta=3000.0, initializer_range=0.3,
            tie_word_embeddings=True, eos_token_id=EOS, rms_norm_eps=1e-5,
        )  # fmt: skip
        self.model = LlamaForCausalLM(config).eval().requires_grad_(False)
        for part in PARTS:
            (folder / part).mkdir()
        for part in ("medusa_tiny", "medusa_decode"):
            self.model.save_pretrained(folder / part / "target")
        self.prompts = [torch.randint(VOCAB, (n,)) for n in (3, 11)]
        self.guessers = [_Guesser(2) for _ in range(3)]
        draft = {
            "vocab_size": VOCAB, "hidden_size": WIDTH, "num_hidden_layers": 2, "num_attention_heads": 4,
            "num_key_value_heads": 2, "intermediate_size": 56, "rms_norm_eps": 1e-3, "rope_theta": 700.0,
            "hidden_act": "silu", "max_position_embeddings": 96,
        }  # fmt: skip
        self.net = _Net(LlamaConfig(**draft, initializer_range=0.3), self.model.get_input_embeddings(), bias=False)
        self.draft = draft | {"bias": False}
        self.tops = {
            "medusa": sorted(map(tuple, MEDUSA_TREE), key=lambda p: (len(p), p)),
            "eagle": sorted(map(tuple, eagle_tree), key=lambda p: (len(p), p)),
        }

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
                expected[f"prompt{i}.layers{layers}.medusa_logits"] = torch.stack(
                    [guesser(states) for guesser in guessers]
                )
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
            found = {
                "input_ids": prompt,
                "hidden_states": states,
                "shifted_ids": shifted,
                "out_features": features,
                "out_logits": self.model.lm_head(features),
            }
            found |= {
                "tree_tokens": torch.tensor(tokens),
                "tree_topk_tokens": best.indices,
                "tree_topk_logits": best.values,
            }
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
        names = {
            "mask": f"{prefix}_attn_mask",
            "depths": "medusa_position_ids" if kind == "medusa" else "tree_position_ids",
        }
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
            batch = torch.stack(
                [torch.cat([ids, torch.tensor([tokens[max(node, 0)] for node in row])]) for row in rows]
            )
            own = self.model.lm_head(self.states(batch)[:, len(ids) :]).argmax(-1).tolist()
            lengths = [
                next(
                    i
                    for i in range(len(row))
                    if i + 1 == len(row) or row[i + 1] < 0 or tokens[row[i + 1]] != own[at][i]
                )
                for at, row in enumerate(rows)
            ]
            best = lengths.index(max(lengths))
            path = rows[best][: lengths[best] + 1]
            accepted = [tokens[node] for node in path]
            steps.append(
                {
                    "tree_tokens": tokens,
                    "best_candidate": best,
                    "path_nodes": path,
                    "accepted_tokens": accepted,
                    "accept_length": len(path) - 1,
                }
            )
            ids, root = torch.cat([ids, torch.tensor(accepted)]), own[best][lengths[best]]
            if stop(accepted):
                generated = ids[len(prompt) :].tolist()
                return {
                    "prompt_ids": prompt.tolist(),
                    "generated_ids": generated,
                    "accept_lengths": [step["accept_length"] for step in steps],
                    "steps": steps,
                }

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
            entries.append(
                self.generate(
                    kind, prompt, lambda accepted, left=left: left.append(left.pop() - len(accepted)) or left[0] <= 0
                )
            )
            for at in (0, 4, 9):
                eos = entries[-1]["generated_ids"][at]
                ends.append(
                    {**self.generate(kind, prompt, lambda accepted, eos=eos: eos in accepted), "eos_token_id": eos}
                )
        (part / "decode.json").write_text(json.dumps({"eos_token_id": EOS, "prompts": entries, "eos_cases": ends}))

    def losses(self) -> None:
        lengths, width = (9, 14, 6), 14
        ids = torch.stack([F.pad(torch.randint(1, VOCAB, (n,)), (0, width - n)) for n in lengths])
        mask = torch.stack([torch.arange(width) < n for n in lengths])
        labels = torch.where(mask & (torch.arange(width) % 5 > 0), ids, -100)
        save_file(
            {"input_ids": ids, "attention_mask": mask.long(), "labels": labels},
            self.folder / "losses/medusa_batch.safetensors",
        )
        logits = [guesser(self.states(ids)) for guesser in self.guessers]
        pairs = [(each[:, : -2 - i].flatten(0, 1), labels[:, 2 + i :].flatten()) for i, each in enumerate(logits)]
        each_loss = [F.cross_entropy(ours, wanted, ignore_index=-100) for ours, wanted in pairs]
        sum(each_loss).backward()
        norms = {}
        for i, guesser in enumerate(self.guessers):
            norms |= {
                f"{i}.0.linear.weight": float(guesser.block.weight.grad.norm()),
                f"{i}.0.linear.bias": float(guesser.block.bias.grad.norm()),
            }
            norms[f"{i}.{guesser.layers}.weight"] = float(guesser.out.weight.grad.norm())
        right = [float((ours.argmax(-1) == wanted)[wanted != -100].float().mean()) for ours, wanted in pairs]
        found = {
            "total_loss": float(sum(each_loss).detach()),
            "per_head_loss": [float(each.detach()) for each in each_loss],
            "per_head_top1": right,
            "grad_l2_norms": norms,
        }
        (self.folder / "losses/medusa_loss.json").write_text(
            json.dumps({"ignore_index": -100, "per_head_linear": found})
        )

        states = [self.states(ids[i, :n]) for i, n in enumerate(lengths)]
        counted = [(torch.arange(n) > 2).long() for n in lengths]
        counted[1][-3:] = 0  # one dialogue ends with something that is no answer
        tensors = {}
        for i, n in enumerate(lengths):
            tensors |= {
                f"item{i}.input_ids": ids[i, :n].clone(),
                f"item{i}.hidden_state": states[i].contiguous(),
                f"item{i}.loss_mask": counted[i],
            }
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
        scalars = {
            "vloss": float(vloss.detach()),
            "ploss": float(ploss.detach()),
            "loss": float((0.7 * vloss + 0.3 * ploss).detach()),
        }
        (self.folder / "losses/eagle_loss.json").write_text(
            json.dumps(
                {**scalars, "v_w": 0.7, "p_w": 0.3, "num_unmasked_positions": int(rows.sum()), "grad_l2_norms": norms}
            )
        )
        tensors |= {
            "batch.input_ids": shifted,
            "batch.hidden_states": hidden,
            "batch.attention_mask": mask.long(),
            "batch.loss_mask": rows,
            "predict": predict.detach(),
        }
        save_file(tensors, self.folder / "losses/eagle.safetensors")
