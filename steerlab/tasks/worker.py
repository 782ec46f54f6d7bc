"""The process that does what must be bounded in time: symbolic checks, foreign scorers, regular expressions, user code.

Run as a script by `workers.Pool` (`python -P worker.py KIND`), one JSON line in, one out, so it must not import
steerlab (that would load torch). Every request carries `limit_s`; past it the operating system ends this process,
even inside C code and even if the parent is gone. Hash seed 0 is set by the parent: some reasoning-gym data sets
iterate over sets of strings. Left out: a sandbox. User functions are the user's own code.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import logging
import math
import os
import random
import re
import signal
import sys
import warnings
from collections.abc import Callable
from dataclasses import fields
from typing import Any

Answer = dict[str, Any]
MEMORY_BYTES = 6 << 30
PATIENCE = 50  # draws in a row without a new text, per text found, before a data set counts as exhausted
MOST_DRAWS = 200_000


def math_handlers() -> dict[str, Callable[..., Answer]]:
    from math_verify import parse, verify

    # math-verify's own time limits use SIGALRM, which ends this process: None (untyped upstream) switches them off.
    never: Any = None

    @functools.lru_cache(maxsize=4096)
    def gold_of(answer: str) -> list:
        return parse(f"\\boxed{{{answer}}}", parsing_timeout=never)

    def check(gold: str, answer: str) -> Answer:
        target = gold_of(gold)
        if not target:
            return {"correct": False, "note": "math-verify cannot read the gold answer"}
        found = parse(f"\\boxed{{{answer}}}", parsing_timeout=never)
        return {"correct": bool(verify(target, found, timeout_seconds=never))}

    return {"math": check}


def gym_handlers() -> dict[str, Callable[..., Answer]]:
    from reasoning_gym.factory import DATASETS

    @functools.lru_cache(maxsize=32)
    def opened(dataset: str, parameters: str, seed: int) -> Any:
        make_dataset, make_config = DATASETS[dataset]
        config = make_config(**json.loads(parameters), seed=seed)
        if hasattr(config, "validate"):  # two data sets have none
            config.validate()
        return make_dataset(config=config)

    @functools.lru_cache(maxsize=100_000)
    def entry(dataset: str, parameters: str, seed: int, index: int) -> dict:
        return opened(dataset, parameters, seed)[index]

    def names() -> Answer:
        return {"names": sorted(DATASETS)}

    def parameters(dataset: str) -> Answer:
        return {"names": [f.name for f in fields(DATASETS[dataset][1]) if f.name not in ("seed", "size")]}

    def draw(dataset: str, parameters: str, seed: int, wanted: int) -> Answer:
        try:
            data = opened(dataset, parameters, seed)
        except (AssertionError, ValueError, TypeError) as error:
            return {"refused": " ".join(str(error).split()) or "its own validation refused them"}
        kept: dict[str, tuple] = {}
        idle = 0
        for index in range(MOST_DRAWS):
            if len(kept) == wanted or idle > PATIENCE * max(len(kept), 20):
                break
            try:
                item = data[index]
            except IndexError:  # made beforehand, in its own size
                break
            idle = idle + 1 if item["question"] in kept else 0
            kept.setdefault(item["question"], (index, item["question"], item["answer"], item["metadata"]))
        return {"problems": list(kept.values())}

    def score(dataset: str, parameters: str, seed: int, index: int, answer: str) -> Answer:
        item = entry(dataset, parameters, seed, index)
        if item["answer"] is None and not answer:
            return {"correct": False, "note": "reasoning-gym gives no gold answer for this data set"}
        got = float(opened(dataset, parameters, seed).score_answer(answer=answer, entry=item))
        return {"correct": got >= 1.0, "note": f"scorer: {got:.3g}" if 0 < got < 1 else ""}

    return {"names": names, "parameters": parameters, "draw": draw, "score": score}


def regex_handlers() -> dict[str, Callable[..., Answer]]:
    def last(pattern: str, group: int, text: str) -> Answer:
        found = None
        for match in re.finditer(pattern, text):
            found = match.group(group)
        return {"extracted": found}

    return {"regex": last}


def function_handlers() -> dict[str, Callable[..., Answer]]:
    @functools.lru_cache(maxsize=8)
    def loaded(file: str, name: str) -> Callable:
        spec = importlib.util.spec_from_file_location("steerlab_user_verifier", file)
        if spec is None or spec.loader is None:
            raise ImportError(f"{file} is not a Python file")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module.__dict__[name]

    def call(file: str, name: str, text: str, answer: str, entry: dict) -> Answer:
        value = loaded(file, name)(text, answer, entry)
        return {"value": value if isinstance(value, bool) else float(value)}

    return {"function": call}


def ifeval_handlers() -> dict[str, Callable[..., Answer]]:
    import langdetect
    from if_verifiable.common import evaluate_instructions
    from if_verifiable.ifeval import INSTRUCTION_DICT, instructions_util
    from nltk.tokenize import NLTKWordTokenizer
    from nltk.tokenize.punkt import PunktSentenceTokenizer, PunktTokenizer

    langdetect.DetectorFactory.seed = 0
    try:
        sentences, words, note = PunktTokenizer("english"), None, ""
    except LookupError:  # nltk's data are a download; its rules alone need none
        sentences, words = PunktSentenceTokenizer(), NLTKWordTokenizer().tokenize
        note = "sentences counted without nltk's punkt_tab data"
    instructions_util._get_sentence_tokenizer = lambda: sentences
    if words is not None:
        instructions_util.nltk.word_tokenize = words

    def follow(ids: list[str], options: list[dict], prompt: str, text: str) -> Answer:
        missing = [i for i in ids if i not in INSTRUCTION_DICT]
        if missing or not ids or len(ids) != len(options):
            return {
                "strict": False,
                "loose": False,
                "note": f"bad problem: unknown or unmatched instructions {missing}",
            }
        random.seed(0)  # a checker without an option draws one
        results, scores = evaluate_instructions(text, ids, options, prompt, INSTRUCTION_DICT)
        counted = any(r.instruction_id == "length_constraints:number_sentences" for r in results)
        return {
            "strict": bool(scores.binary_strict),
            "loose": bool(scores.binary_loose),
            "passed": [r.instruction_id for r in results if r.strict_pass],
            "note": note if counted else "",
        }

    return {"ifeval": follow}


HANDLERS = {
    "math": math_handlers,
    "gym": gym_handlers,
    "regex": regex_handlers,
    "function": function_handlers,
    "ifeval": ifeval_handlers,
}


def serve(kind: str) -> None:
    """Answers requests until the input ends."""
    channel = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what foreign code prints must not enter the channel

    def say(answer: Answer) -> None:
        channel.write(json.dumps(answer, default=str) + "\n")
        channel.flush()

    logging.disable()
    warnings.simplefilter("ignore")
    try:
        handlers = HANDLERS[kind]()
    except ImportError as error:
        say({"missing": error.name or str(error)})
        return
    say({"ready": True})
    for line in sys.stdin.buffer:
        request = json.loads(line)
        _alarm(request.pop("limit_s"))
        try:
            answer = handlers[request.pop("op")](**request)
        except Exception as error:  # noqa: BLE001  a foreign scorer may raise anything; it becomes the verdict's note
            answer = {"correct": False, "error": f"{type(error).__name__}: {error}"[:300]}
        _alarm(0)
        say(answer)


def _alarm(seconds: float) -> None:
    if hasattr(signal, "SIGALRM"):
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(math.ceil(seconds) + 1 if seconds else 0)


def _limit_memory() -> None:
    try:
        import resource
    except ImportError:  # not on Windows
        return
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES if hard < 0 else min(MEMORY_BYTES, hard), hard))


if __name__ == "__main__":
    _limit_memory()
    serve(sys.argv[1])
