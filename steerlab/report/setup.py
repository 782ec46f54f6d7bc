"""The sections of a run's page that come from its manifest: what was run, on what, and what it cost."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pandas as pd

from steerlab.report.page import Section, Table
from steerlab.runs import CostLedger, Run

# Field of the cost ledger → (what it is, how its number is written).
_COSTS = {
    "rollout_s": ("sampling completions", "s"),
    "reward_s": ("judging them", "s"),
    "update_s": ("gradients and optimiser", "s"),
    "evaluate_s": ("evaluation", "s"),
    "steps": ("updates", ""),
    "tokens_prompt": ("tokens read (prompts, texts)", ""),
    "tokens_completion": ("completion tokens", ""),
    "trained_parameters": ("trained parameters", ""),
    "optimiser_bytes": ("optimiser state", "B"),
    "exchanged_bytes": ("gradients that each process sent, in total", "B"),
    "peak_memory_bytes": ("peak memory of the process", "B"),
}


def title(run: Run) -> str:
    """`rloo on smollm2-135m: chain_sum`, as far as the manifest says; else the folder's name."""
    recipe, model, task = (_find(run, name) for name in ("recipe", "model", "task"))
    task = task or _find(run, "corpus")
    if recipe is None or model is None:
        return run.folder.name or "run"
    return f"{recipe} on {model}" + (f": {task}" if task else "")


def facts(run: Run) -> tuple[tuple[str, str], ...]:
    """The few facts that stand under the headline."""
    named = {
        "model": _find(run, "model"),
        "recipe": _find(run, "recipe"),
        "task": _find(run, "task"),
        "corpus": _find(run, "corpus"),
        "trained parameters": _count(_cost(run).get("trained_parameters")),
        "updates": _find(run, "steps"),
        "seed": _find(run, "seed"),
        "dtype": _find(run, "dtype"),
        "machine": (run.manifest.get("environment") or {}).get("cpu"),
        "weights SHA-256": _short(_find(run, "weights_sha256")),
    }
    return tuple((name, str(value)) for name, value in named.items() if value not in (None, ""))


def cost(run: Run, metrics: pd.DataFrame) -> Section | None:
    """Seconds, tokens and bytes; from the manifest's ledger."""
    ledger = _cost(run)
    rows = [(meaning, _amount(ledger[name], unit)) for name, (meaning, unit) in _COSTS.items() if ledger.get(name, 0)]
    if "wall_s" in metrics.columns and len(metrics["wall_s"].dropna()):
        rows.insert(0, ("training, wall clock", _amount(sum(metrics["wall_s"].dropna()), "s")))
    if not rows:
        return None
    spent = {name: ledger.get(name, 0) for name in ("rollout_s", "reward_s", "update_s")}
    total = sum(spent.values())
    shares = ", ".join(f"{_COSTS[name][0]} {value / total:.0%}" for name, value in spent.items()) if total else ""
    return Section(
        "Cost",
        f"Of the training time: {shares}." if shares else "",
        tables=(Table(("what", "amount"), tuple(rows), frozenset({1})),),
    )


def setup(run: Run) -> Section:
    """Everything needed to do it again: configuration, versions, machine."""
    environment = run.manifest.get("environment") or {}
    versions = environment.get("versions") or {}
    shown = {
        "weights SHA-256": _find(run, "weights_sha256"),
        "configuration SHA-256": _find(run, "config_sha256"),
        "steerlab revision": environment.get("git_revision"),
        "Python": environment.get("python"),
        **versions,
        "platform": environment.get("platform"),
        "processor": environment.get("cpu"),
        "accelerator": environment.get("accelerator"),
        "cores": environment.get("cores"),
        "threads": environment.get("threads"),
        "memory": _amount(environment["memory_bytes"], "B") if environment.get("memory_bytes") else None,
    }
    machine = tuple((name, str(value)) for name, value in shown.items() if value is not None)
    hidden = ("environment", "cost", "format", "format_version", "experiment")
    others = {name: value for name, value in run.manifest.items() if name not in hidden}
    configuration = tuple(_flat(run.manifest.get("experiment"), "")) + tuple(_flat(others, ""))
    return Section(
        "What was run",
        "The manifest of the run holds all of this as JSON. The same configuration, seed and machine give the same "
        "bytes.",
        tables=(Table(("versions and machine", "value"), machine),),
        folded=(("Full configuration", Table(("field", "value"), configuration)),) if configuration else (),
    )


def _cost(run: Run) -> Mapping[str, Any]:
    found = run.manifest.get("cost") or {}
    return {name: value for name, value in found.items() if name in CostLedger.__dataclass_fields__}


def _find(run: Run, name: str) -> str | None:
    """A value by its field name: of the manifest, else of the experiment, else the nearest nested one."""
    queue: list[Any] = [run.manifest, run.manifest.get("experiment")]
    while queue:
        value = queue.pop(0)
        if isinstance(value, dict):
            if (found := value.get(name)) is not None:
                if isinstance(found, dict):
                    found = found.get("name") or str(found.get("$type", "")).rpartition(":")[2] or None
                if found is not None:
                    return str(found)
            queue += [item for key, item in value.items() if key != "environment"]
    return None


def _flat(value: Any, prefix: str) -> list[tuple[str, str]]:
    """Encoded JSON as (dotted field, text) rows."""
    if isinstance(value, dict):
        if len(value) == 1 and next(iter(value)).startswith("$"):
            return _flat(next(iter(value.values())), prefix)
        rows = [(prefix or "experiment", str(value["$type"]).rpartition(":")[2])] if "$type" in value else []
        inner = ((key, item) for key, item in value.items() if key != "$type")
        return rows + [row for key, item in inner for row in _flat(item, f"{prefix}.{key}" if prefix else key)]
    if isinstance(value, list) and any(isinstance(item, dict) for item in value):
        return [row for index, item in enumerate(value) for row in _flat(item, f"{prefix}[{index}]")]
    if isinstance(value, list):
        return [(prefix, ", ".join(map(str, value)) or "none")]
    return [] if value is None and not prefix else [(prefix, "—" if value is None else str(value))]


def _short(digest: str | None) -> str | None:
    return f"{digest[:12]}…" if digest and len(digest) > 12 else digest


def _count(number: int | float | None) -> str | None:
    return f"{int(number):,}" if number else None


def _amount(number: int | float, unit: str) -> str:
    if unit == "s":
        return f"{number:.1f} s" if number < 120 else f"{int(number // 60)} min {number % 60:.0f} s"
    if unit == "B":
        for name, size in (("GB", 1e9), ("MB", 1e6), ("KB", 1e3)):
            if number >= size:
                return f"{number / size:.3g} {name}"
        return f"{int(number)} B"
    return f"{int(number):,}"
