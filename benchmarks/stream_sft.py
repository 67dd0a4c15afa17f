"""Fine-tunes a vision-language model for streams with Trainer and PEFT, the vision tower frozen, and keeps its losses.

python benchmarks/stream_sft.py --out benchmarks/results/stream-sft-tiny.json
python benchmarks/stream_sft.py --model MODEL --data train.jsonl --root videos/ --save adapter/ --out losses.json

Without --data it makes films of one colour a second, and transcripts that name them; without --model a tiny random
Qwen2.5-VL. From the transcripts on, everything is what real data goes through: overlapped chunks, the published files,
frames decoded from video.
"""

from __future__ import annotations

import argparse
import random
import tempfile
from pathlib import Path
from typing import Any

import av
import numpy as np
import peft
import transformers as hf

from hf_longctx.evals import assets, results
from hf_longctx.testing.vision import tiny_qwen2_5_vl
from hf_longctx.training.adapt import freeze_vision, text_linears
from hf_longctx.training.chunks import OverlappedChunks, Word
from hf_longctx.training.collator import StreamCollator
from hf_longctx.training.lines import Lines, Rows, write

COLOURS = {"red": (220, 30, 30), "green": (20, 160, 60), "blue": (40, 70, 220), "white": (240, 240, 240)}
FPS = 2
LAST = 5  # steps at either end of a run, whose mean loss is compared


def make_data(folder: Path, films: int, duration: int, window_s: float) -> Path:
    """Films of one colour a second, and the published files of their chunks."""
    cut = OverlappedChunks(window_s, window_s / 2, min_words=1)
    chunks = []
    for number in range(films):
        names = random.Random(number).choices(list(COLOURS), k=duration)
        path = folder / f"film-{number}.mkv"
        with av.open(str(path), "w") as container:
            stream = container.add_stream("ffv1", rate=FPS, width=56, height=56, pix_fmt="bgr0")
            for name in names:
                picture = av.VideoFrame.from_ndarray(np.full((56, 56, 3), COLOURS[name], np.uint8), format="rgb24")
                for _ in range(FPS):
                    container.mux(stream.encode(picture.reformat(format="bgr0")))
            container.mux(stream.encode())
        words = [Word(second + 0.2, second + 0.8, name) for second, name in enumerate(names)]
        chunks += cut.cut(path.name, duration, words, "Name the colour.")
    write(folder / "train.jsonl", chunks)
    return folder / "train.jsonl"


def train(chosen: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """One run: its losses, and what was trained."""
    data = chosen.data or make_data(folder, chosen.films, 16, 8.0)
    lines = Lines(data)
    if chosen.model is None:
        model, processor = tiny_qwen2_5_vl(texts=[" ".join(COLOURS)])
    else:
        model, processor = assets.load_vision(chosen.model, chosen.dtype, chosen.device)
    root = chosen.root or data.parent
    collator = StreamCollator(model, processor, fps=FPS, root=root, max_pixels=chosen.max_pixels)
    frozen = freeze_vision(model)
    lora = peft.LoraConfig(r=chosen.rank, lora_alpha=2 * chosen.rank, target_modules=text_linears(model))
    adapted = peft.get_peft_model(model, lora)
    settings = hf.TrainingArguments(
        str(folder / "run"),
        max_steps=chosen.steps,
        per_device_train_batch_size=chosen.rows,
        learning_rate=chosen.rate,
        lr_scheduler_type="cosine",
        warmup_steps=max(1, chosen.steps * 3 // 100),
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        remove_unused_columns=False,
        seed=0,
        use_cpu=model.device.type == "cpu",
        disable_tqdm=chosen.quiet,
    )
    trainer = hf.Trainer(adapted, settings, train_dataset=Rows(lines), data_collator=collator)
    trainer.train()
    if chosen.save is not None:
        adapted.save_pretrained(chosen.save)
    losses = [float(entry["loss"]) for entry in trainer.state.log_history if "loss" in entry]
    trained = sum(weight.numel() for weight in adapted.parameters() if weight.requires_grad)
    return {
        "chunks": len(lines),
        "frozen_weights_of_vision": frozen,
        "trained_weights": trained,
        "losses": losses,
        "first": sum(losses[:LAST]) / LAST,
        "last": sum(losses[-LAST:]) / LAST,
        "device": model.device,
    }


def parser() -> argparse.ArgumentParser:
    """Arguments; the defaults are the tiny run."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--out", type=Path, required=True)
    made.add_argument("--model", help="a hub id or folder; a tiny random Qwen2.5-VL if not given")
    made.add_argument("--data", type=Path, help="JSONL file in the published format; made if not given")
    made.add_argument("--root", type=Path, help="folder of the videos; that of the data if not given")
    made.add_argument("--save", type=Path, help="folder for the adapter")
    made.add_argument("--films", type=int, default=12, help="that are made")
    made.add_argument("--steps", type=int, default=60)
    made.add_argument("--rows", type=int, default=4, help="chunks of a step")
    made.add_argument("--rank", type=int, default=16)
    made.add_argument("--rate", type=float, default=5e-3, help="learning rate at its highest")
    made.add_argument("--max-pixels", type=int)
    made.add_argument("--dtype", default="float32")
    made.add_argument("--device", default="auto")
    made.add_argument("--quiet", action="store_true")
    return made


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Train, and write what came of it."""
    chosen = parser().parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        found = train(chosen, Path(folder))
    settings = {
        name: value for name, value in vars(chosen).items() if isinstance(value, (int, float)) or name == "dtype"
    }
    settings["model"] = "tiny random Qwen2.5-VL" if chosen.model is None else assets.display_name(chosen.model)
    row = {
        "case": "overlapped-chunk fine-tune, last loss",
        "value": found["last"],
        "unit": "nats per token",
        "baseline": "first loss",
        "baseline_value": found["first"],
        "ratio": found["last"] / found["first"],
        "floor_value": None,
        "must": "below 0.5 of the first",
        "met": found["last"] < 0.5 * found["first"],
        **{name: found[name] for name in ("chunks", "frozen_weights_of_vision", "trained_weights", "losses")},
    }
    results.save_json(chosen.out, {"meta": results.meta(found["device"], settings), "rows": [row]})
    print(
        f"loss {found['first']:.3f} -> {found['last']:.3f}, {found['trained_weights']:,} weights trained: {chosen.out}"
    )
    return row


if __name__ == "__main__":
    main()
