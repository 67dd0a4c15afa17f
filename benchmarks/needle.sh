#!/usr/bin/env bash
# The full grids on one GPU: needle, pass keys and RULER tasks of a model under every method that it supports.
#
#   benchmarks/needle.sh MODEL [OUT] [TEXT]
#
# TEXT is a long UTF-8 file for the haystack; the text that ships with the package is repeated from 33,000 tokens on, and
# has too few words for cwe beyond 64K. Interrupted, the same command goes on where it was. METHODS, LENGTHS and BATCH
# can be set in the environment.
set -euo pipefail

model=${1:?a hub id or folder}
out=${2:-out}
common=(-m "$model" -o "$out" --resume --device cuda --dtype bfloat16 --batch "${BATCH:-1}")
common+=(--methods "${METHODS:-dense,streaming_llm,duo_attention}" --lengths "${LENGTHS:-4k,8k,16k,32k}")
if [ -n "${3:-}" ]; then
  common+=(--text "$3")
fi

hf-longctx eval needle "${common[@]}" --depths 11 --trials 5
hf-longctx eval passkey "${common[@]}" --trials 50
hf-longctx eval ruler "${common[@]}" --samples 50
