"""Tables of the servers under load: README.md beside the results."""

from __future__ import annotations

import statistics
from pathlib import Path

from benchmarks.report import Result, read_files, table

RESULTS = Path("benchmarks/results/serving")

HEAD = """# Servers under load

Written by `python -m benchmarks.serving`; do not edit. Medians of interleaved rounds, client (AIPerf) and server on the same
cores. Times are in milliseconds: to the first token, between two tokens of an answer, and from a request to its last token.
*Good* is the share of requests with their first token within {first_token_s} s and {token_s} s a token. *Ratio* is our rate of
output tokens over that of the server, median of the rounds. Cores: how many the server and AIPerf kept busy, and all else.
*Sent late* is the 99th percentile of the time between when a request was due and when AIPerf sent it, which no other figure
contains.
"""
_COLUMNS = (
    "server", "tokens/s", "ratio", "requests/s", "first token p50, p99", "a token p50, p99", "request p50, p99", "good",
    "cores: server, client, other", "sent late", "failed",
)  # fmt: skip


def markdown(results: list[Result]) -> str:
    """The whole page."""
    return "\n".join([HEAD.format_map(results[0]["limits"]), *(_section(result) for result in results)]).rstrip() + "\n"


def ratios(result: Result, workload: str, server: str) -> list[float]:
    """Our rate of output tokens over a server's, for each round in which both answered."""
    ours, theirs = (_by_round(result, workload, name) for name in (result["servers"][0], server))
    name = "output_tokens_per_second"
    rounds = (number for number in sorted(set(ours) & set(theirs)) if theirs[number][name])
    return [ours[number][name] / theirs[number][name] for number in rounds]


def _by_round(result: Result, workload: str, server: str) -> dict[int, Result]:
    samples = (sample for sample in result["samples"] if "error" not in sample)
    return {sample["round"]: sample for sample in samples if (sample["workload"], sample["server"]) == (workload, server)}


def _section(result: Result) -> str:
    machine = result["machine"]
    host = f"{machine['processor']}, {result['threads']} threads, {machine['memory_gib']} GiB, {machine['system']}"
    about = f"{host}, {machine['date']}; {result['rounds']} rounds of {result['seconds']:g} s; {result['questions']} questions."
    versions = "; ".join(words for words in result["versions"].values())
    lines = [f"## {result['model']}", "", about, f"{versions}.", ""]
    for workload, settings in result["workloads"].items():
        rows = [_row(result, workload, server) for server in result["servers"]]
        rows = [row for row in rows if row]
        if rows:
            lines += [f"### {workload}", "", f"{_words(settings)}.", "", *table(list(_COLUMNS), rows), ""]
    errors = [f"- {name}: {error}" for name, error in result["failed"].items()]
    errors += [
        f"- {sample['server']}, {sample.get('workload', 'start')}: {sample['error']}"
        for sample in result["samples"]
        if "error" in sample
    ]
    return "\n".join([*lines, *(["Failed:", "", *errors, ""] if errors else [])])


def _words(settings: Result) -> str:
    words = [settings["arrivals"], "caches on" if settings["caches"] else "caches off"]
    words += ["one system prompt for all"] if settings["shared_system_prompt"] else []
    words += [f"questions by Zipf's law ({settings['zipf_exponent']})"] if settings["zipf_exponent"] else []
    words += [f"chats of {settings['turns']} questions"] if settings["turns"] > 1 else []
    words += [f"{settings['cancelled_percent']}% of the requests cancelled"] if settings["cancelled_percent"] else []
    return ", ".join(words)


def _row(result: Result, workload: str, server: str) -> list[str]:
    samples = list(_by_round(result, workload, server).values())
    if not samples:
        return []

    def median(name: str) -> float:
        return float(statistics.median(sample[name] for sample in samples))

    def pair(name: str) -> str:
        return f"{median(f'{name}_p50'):,.1f}, {median(f'{name}_p99'):,.1f}"

    found = ratios(result, workload, server)
    cores = ", ".join(f"{median(name):.2f}" for name in ("server_cores", "client_cores", "other_cores"))
    return [
        server, f"{median('output_tokens_per_second'):,.0f}", f"{statistics.median(found):.2f}" if found else "",
        f"{median('requests_per_second'):,.2f}", pair("first_token"), pair("time_per_token"), pair("latency"),
        f"{median('good'):.0%}", cores, f"{median('client_queue_p99'):.1f}", str(sum(sample["failed"] for sample in samples)),
    ]  # fmt: skip


def write(folder: Path) -> Path:
    """Write README.md of a folder of results."""
    path = folder / "README.md"
    path.write_text(markdown(read_files(folder, "*.json", "serving")), encoding="utf-8")
    return path
