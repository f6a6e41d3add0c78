"""What the server counts, in Prometheus' text format (version 0.0.4)."""

import os
from collections import Counter
from pathlib import Path

from ..loading import weight_bytes
from .worker import Worker

# A family: its kind, what it means, and its samples as (labels, value).
Family = tuple[str, str, list[tuple[str, float]]]


class Metrics:
    """Counters of requests, and the worker's own figures when they are asked for. Used in the event loop's thread."""

    def __init__(self, worker: Worker) -> None:
        self.worker = worker
        self.requests: Counter[tuple[str, int]] = Counter()  # (route, status)
        self.n_prompt_tokens = self.n_generated_tokens = 0  # of finished requests
        self.n_cancelled = 0
        self.first_token_s, self.n_first_tokens = 0.0, 0
        self._weights_bytes = weight_bytes(worker.model)
        draft = worker.draft_model
        self._draft_bytes = 0 if draft is None else weight_bytes(draft)

    def text(self) -> str:
        """All figures."""
        lines = []
        for name, (kind, meaning, samples) in self._families().items():
            lines += [f"# HELP graft_{name} {meaning}", f"# TYPE graft_{name} {kind}"]
            lines += [f"graft_{name}{labels} {value:.17g}" for labels, value in samples]
        return "\n".join(lines) + "\n"

    def _families(self) -> dict[str, Family]:
        worker, engine = self.worker, self.worker.engine
        prefix = worker.prefix_cache
        requests = [
            (f'{{route="{route}",status="{status}"}}', float(n)) for (route, status), n in sorted(self.requests.items())
        ]

        def one(kind: str, meaning: str, value: float) -> Family:
            return kind, meaning, [("", float(value))]

        return {
            "requests_total": ("counter", "Answered requests.", requests),
            "requests_cancelled_total": one("counter", "Requests whose client went.", self.n_cancelled),
            "prompt_tokens_total": one("counter", "Tokens of answered prompts.", self.n_prompt_tokens),
            "completion_tokens_total": one("counter", "Tokens of answers.", self.n_generated_tokens),
            "generated_tokens_total": one("counter", "Tokens that the engine made.", worker.n_generated),
            "first_token_seconds_sum": one(
                "counter", "Seconds to the first token, of streamed answers.", self.first_token_s
            ),
            "first_token_seconds_count": one("counter", "Streamed answers with a first token.", self.n_first_tokens),
            "tokens_per_second": one("gauge", "New tokens a second in the last ten.", worker.tokens_per_second()),
            "running": one("gauge", "Rows of the batch.", engine.n_running),
            "waiting": one("gauge", "Requests that wait for a row.", engine.n_waiting),
            "preempted_total": one("counter", "Answers that gave their pages back and began anew.", engine.n_preempted),
            "drafted_tokens_total": one("counter", "Tokens guessed by speculation.", engine.n_drafted),
            "accepted_tokens_total": one("counter", "Guesses that were right.", engine.n_accepted),
            "max_batch": one("gauge", "Rows at most.", engine.max_batch),
            "adapters_loaded": one("gauge", "Adapters in memory.", worker.models.n_loaded),
            "adapters_bytes": one(
                "gauge", "Their weights.", sum(a.n_bytes for a in list(worker.models.bank.adapters.values()))
            ),
            "weights_bytes": one("gauge", "The base's weights.", self._weights_bytes),
            "cache_bytes": one(
                "gauge", "Keys and values of the batch; with --cache-mib all pages.", engine.cache_bytes
            ),
            "prefix_cache_bytes": one(
                "gauge", "Keys and values kept of earlier prompts.", prefix.n_bytes if prefix else 0
            ),
            "prefix_cache_limit_bytes": one("gauge", "Their budget.", prefix.max_bytes if prefix else 0),
            "prefix_hit_tokens_total": one(
                "counter", "Prompt tokens found in the prefix cache.", prefix.n_hit_tokens if prefix else 0
            ),
            "prefix_prompt_tokens_total": one(
                "counter", "Prompt tokens looked up in it.", prefix.n_prompt_tokens if prefix else 0
            ),
            "predicted_bytes": one(
                "gauge",
                "Weights, the draft model's too, adapters, the batch's cache and the prefix cache.",
                self._weights_bytes
                + self._draft_bytes
                + sum(a.n_bytes for a in list(worker.models.bank.adapters.values()))
                + engine.cache_bytes
                + (prefix.n_bytes if prefix and not worker.has_pages else 0),  # else its pages are among the batch's
            ),
            "resident_bytes": one(
                "gauge", "The process's resident memory, Python and its libraries included.", resident()
            ),
        }


def resident() -> int:
    """Resident memory of this process in bytes; 0 where the system doesn't tell."""
    try:
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    except (OSError, ValueError, IndexError):
        return 0
    return pages * os.sysconf("SC_PAGE_SIZE")
