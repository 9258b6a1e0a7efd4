"""Exact answers of the exported model through llama.cpp, on albums of pictures that it has never seen.

    python -m tools.train_demo.check [--model TEXT.gguf --mmproj MMPROJ.gguf] [--torch N] [--json FILE]

Greedy decoding, no repeat penalty. Every question is asked twice: alone, right after the pictures, and in one running
chat with the model's own answers before it. Uses whatever ``llama_cpp`` is installed.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from edge_csp.demo.albums import Album, make_album
from edge_csp.demo.scenes import held_out_scenes

from . import MMPROJ_FILE, TEXT_FILE
from .albums import tokenizer
from .chat import Message, segments

CHECK_SEED = 7_000_000  # far away from any training seed
MAX_ANSWER = 24
REQUIRED = 0.95


class LlamaCpp:
    """One context of llama.cpp with its vision part; a cache position to go back to is all the state."""

    def __init__(self, text: Path, mmproj: Path, n_ctx: int = 4096, n_threads: int = 1) -> None:
        import llama_cpp
        from llama_cpp import mtmd_cpp

        self._lib, self._mtmd = llama_cpp, mtmd_cpp
        self._silent = llama_cpp.llama_log_callback(lambda _level, _text, _data: None)
        for set_log in (llama_cpp.llama_log_set, mtmd_cpp.mtmd_log_set, mtmd_cpp.mtmd_helper_log_set):
            set_log(self._silent, None)
        llama_cpp.llama_backend_init()
        self._model = llama_cpp.llama_model_load_from_file(str(text).encode(), llama_cpp.llama_model_default_params())
        if not self._model:
            raise RuntimeError(f"llama.cpp cannot load {text}")
        params = llama_cpp.llama_context_default_params()
        params.n_ctx, params.n_batch, params.n_threads, params.n_threads_batch = n_ctx, 512, n_threads, n_threads
        self._ctx = llama_cpp.llama_init_from_model(self._model, params)
        self._vocab = llama_cpp.llama_model_get_vocab(self._model)
        self.n_vocab = llama_cpp.llama_vocab_n_tokens(self._vocab)
        vision = mtmd_cpp.mtmd_context_params_default()
        vision.use_gpu, vision.n_threads, vision.print_timings, vision.warmup = False, n_threads, False, False
        self._vision = mtmd_cpp.mtmd_init_from_file(str(mmproj).encode(), self._model, vision)
        if not self._vision:
            raise RuntimeError(f"libmtmd cannot load {mmproj}")
        self.n_past = 0

    def close(self) -> None:
        self._mtmd.mtmd_free(self._vision)
        self._lib.llama_free(self._ctx)
        self._lib.llama_model_free(self._model)

    def rewind(self, n_past: int) -> None:
        """Forget everything from position n_past on."""
        self._lib.llama_memory_seq_rm(self._lib.llama_get_memory(self._ctx), 0, n_past, -1)
        self.n_past = n_past

    def tokenize(self, text: str) -> list[int]:
        data = text.encode()
        out = (self._lib.llama_token * (len(data) + 8))()
        n = self._lib.llama_tokenize(self._vocab, data, len(data), out, len(out), True, True)
        return list(out[:n])

    def feed(self, text: str, pictures: Sequence[np.ndarray] = ()) -> None:
        """Evaluate text with its pictures (64, 64, 3) behind what is there."""
        mtmd = self._mtmd
        with contextlib.ExitStack() as stack:
            bitmaps = (mtmd.mtmd_bitmap_p_ctypes * max(1, len(pictures)))()
            for i, picture in enumerate(pictures):
                height, width, _ = picture.shape
                data = np.ascontiguousarray(picture).ctypes.data_as(ctypes.POINTER(ctypes.c_uint8))
                bitmaps[i] = mtmd.mtmd_bitmap_init(width, height, data)
                stack.callback(mtmd.mtmd_bitmap_free, bitmaps[i])
            chunks = mtmd.mtmd_input_chunks_init()
            stack.callback(mtmd.mtmd_input_chunks_free, chunks)
            data = text.encode()
            source = mtmd.mtmd_input_text(data, len(data), self.n_past == 0, True)
            status = mtmd.mtmd_tokenize(self._vision, chunks, ctypes.byref(source), bitmaps, len(pictures))
            if status != 0:
                raise RuntimeError(f"mtmd_tokenize failed with {status}")
            n_past = self._lib.llama_pos(0)
            status = mtmd.mtmd_helper_eval_chunks(
                self._vision, self._ctx, chunks, self.n_past, 0, 512, True, ctypes.byref(n_past)
            )
            if status != 0:
                raise RuntimeError(f"mtmd_helper_eval_chunks failed with {status}")
            self.n_past = n_past.value

    def logits(self) -> np.ndarray:
        """Logits (n_vocab,) behind the last evaluated token."""
        return np.ctypeslib.as_array(self._lib.llama_get_logits_ith(self._ctx, -1), (self.n_vocab,)).copy()

    def answer(self) -> str:
        """Decode greedily until an end token; the end token is evaluated too, as in a running chat."""
        out: list[int] = []
        while len(out) < MAX_ANSWER:
            token = int(self.logits().argmax())
            batch = self._lib.llama_batch_get_one((self._lib.llama_token * 1)(token), 1)
            if self._lib.llama_decode(self._ctx, batch) != 0:
                raise RuntimeError("llama_decode failed")
            self.n_past += 1
            if self._lib.llama_vocab_is_eog(self._vocab, token):
                break
            out.append(token)
        return tokenizer().decode(out)


def prompt(messages: Sequence[Message], cue: bool = False) -> str:
    return "".join(segment.text for segment in segments(messages, cue=cue))


def _ask_alone(llama: LlamaCpp, album: Album, pictures: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
    """Each question right after the pictures; yields the answer and the first logits."""
    llama.rewind(0)
    head = prompt(album.messages)
    llama.feed(head, list(pictures))
    start = llama.n_past
    for _kind, question, _answer in album.questions:
        llama.rewind(start)
        tail = prompt([*album.messages, {"role": "user", "content": question}], cue=True).removeprefix(head)
        llama.feed(tail)
        logits = llama.logits()
        yield llama.answer(), logits


def _ask_chat(llama: LlamaCpp, album: Album, pictures: np.ndarray) -> Iterator[str]:
    """All questions in one conversation, new text only."""
    llama.rewind(0)
    messages, done, images = list(album.messages), "", list(pictures)
    for _kind, question, _answer in album.questions:
        messages.append({"role": "user", "content": question})
        text = prompt(messages, cue=True)
        llama.feed(text.removeprefix(done), images)
        reply = llama.answer()
        messages.append({"role": "assistant", "content": reply})
        done, images = prompt(messages), []
        yield reply


def check(
    text: Path,
    mmproj: Path,
    n_albums: int = 12,
    sizes: Sequence[int] = (8, 12),
    n_torch: int = 0,
    seed: int = CHECK_SEED,
) -> dict[str, Any]:
    """Accuracy per album size; of the first ``n_torch`` albums also agreement with torch."""
    pool, labels = held_out_scenes(1500, seed)
    llama = LlamaCpp(text, mmproj)
    reference = None
    if n_torch > 0:
        from .reference import Reference

        reference = Reference(text, mmproj)
    report: dict[str, Any] = {}
    for size in sizes:
        n, alone, chat = 0, 0, 0
        right, asked = Counter[str](), Counter[str]()
        wrong: list[str] = []
        agree: list[bool] = []
        difference: list[float] = []
        for index in range(n_albums):
            album = make_album(seed + index, labels, size, 2, style=True)
            pictures = pool[album.pictures]
            embedded = reference.embed_pictures(pictures) if reference is not None and index < n_torch else None
            for (kind, question, answer), (reply, logits) in zip(
                album.questions, _ask_alone(llama, album, pictures), strict=True
            ):
                n, alone, asked[kind] = n + 1, alone + (reply == answer), asked[kind] + 1
                right[kind] += reply == answer
                if reply != answer:
                    wrong.append(f"{question} {reply!r} instead of {answer!r}")
                if reference is not None and embedded is not None:
                    own, wanted = reference.answer_logits(album, embedded, question, answer)
                    agree.append((own.argmax(-1).tolist() == wanted) == (reply == answer))
                    difference.append(float(np.abs(own[0].numpy() - logits).max() / np.abs(logits).max()))
            chat += sum(
                reply == answer
                for (_, _, answer), reply in zip(album.questions, _ask_chat(llama, album, pictures), strict=True)
            )
        report[str(size)] = {
            "questions": n,
            "alone": alone / n,
            "chat": chat / n,
            "by_kind": {kind: right[kind] / asked[kind] for kind in asked},
            "wrong": wrong,
        }
        if reference is not None:
            report[str(size)] |= {
                "torch_questions": len(agree),
                "torch_same_verdict": sum(agree) / len(agree),
                "torch_largest_logit_difference": max(difference),
            }
    llama.close()
    return report


def show(report: dict[str, Any]) -> None:
    for size, part in report.items():
        print(
            f"{size} pictures: {part['questions']} questions, "
            f"exact {part['alone']:.1%} alone, {part['chat']:.1%} in one chat"
        )
        print("   " + ", ".join(f"{kind} {share:.0%}" for kind, share in part["by_kind"].items()))
        if "torch_questions" in part:
            print(
                f"   torch, {part['torch_questions']} questions: same verdict {part['torch_same_verdict']:.1%}, "
                f"largest logit difference {part['torch_largest_logit_difference']:.1e}"
            )


def main() -> int:
    folder = Path("edge_csp/demo")
    parser = argparse.ArgumentParser(description="Exact-answer accuracy of the demo model through llama.cpp.")
    parser.add_argument("--model", type=Path, default=folder / TEXT_FILE)
    parser.add_argument("--mmproj", type=Path, default=folder / MMPROJ_FILE)
    parser.add_argument(
        "--albums", type=int, default=12, help="albums per size, 22 questions each (default: %(default)s)"
    )
    parser.add_argument("--torch", type=int, default=0, metavar="N", help="compare N albums with torch")
    parser.add_argument("--seed", type=int, default=CHECK_SEED, help="draws other albums (default: %(default)s)")
    parser.add_argument("--json", type=Path, help="write the report to this file")
    args = parser.parse_args()
    report = check(args.model, args.mmproj, n_albums=args.albums, n_torch=args.torch, seed=args.seed)
    show(report)
    if args.json:
        args.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return 0 if all(part["alone"] >= REQUIRED for part in report.values()) else 1


if __name__ == "__main__":
    raise SystemExit(main())
