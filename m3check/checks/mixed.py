"""A mixed batch between its kernels: the metadata that they read, the buffer that ids are handed over in, the host's waits.

What metadata must be is told by `reference.batch`. It is read by the names of attributes, so that any implementation's
objects are judged; what one of them lacks is not.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import accumulate
from typing import Any

from m3check.checks.view import View
from m3check.types import BLOCK, Finding, Status

COUNTS = ("num_decodes", "num_decode_tokens", "num_prefills", "num_prefill_tokens")

VECTORS: Mapping[str, tuple[tuple[str, ...], str, str]] = {  # attributes: (its names, entry of the reference, words)
    "decode_seq_lens": (("decode.seq_lens",), "decode_seq_lens", "visible tokens of the decoded requests"),
    "prefill_seq_lens": (("prefill.seq_lens",), "prefill_seq_lens", "visible tokens of the prefilled requests"),
    "prefix_lens": (("prefill.prefix_lens", "prefill.context_lens", "prefill_msa.prefix_lens"), "prefill_prefix_lens",
                    "tokens before the first query of each prefilled request: seq_lens - query lengths"),
    "cu_seqlens_q": (("prefill.cu_seqlens_q", "prefill_msa.cu_seqlens_q"), "prefill_cu_seqlens_q",
                     "first query row of each prefilled request, counted from the first prefilled row"),
}  # fmt: skip


def check_metadata(view: View) -> list[Finding]:
    """Counts, lengths and row starts of both parts, in the indexer's metadata and in attention's."""
    served = view.run.served
    if served is None:
        return []
    wanted = {
        name: view.expected[name].tolist() for name in view.expected if name.startswith(("num_", "decode_", "prefill_"))
    }
    for which, held in (("indexer", served.index), ("attention", served.main)):
        for name, words in _faults(held, wanted, view):
            return [Finding("metadata", Status.FAILED, 1.0, 0.0, f"`{name}` of the {which}'s metadata", words)]
    for name, one, two in _unlike(served.index, served.main):
        where = f"`{name}` of the indexer's and of attention's metadata"
        return [Finding("metadata", Status.FAILED, 1.0, 0.0, where, f"{one} and {two}: they split the batch differently")]
    if served.unset:
        hint = "not -inf after `build`: what an earlier step left in a cell that no kernel of this one writes may be chosen"
        return [Finding("metadata", Status.FAILED, float(len(served.unset)), 0.0, f"`{served.unset[0]}`", hint)]
    if served.moved:
        hint = "a captured graph reads the old place in every replay; views of persistent memory stay where they are"
        where = f"`{served.moved[0]}`"
        return [
            Finding("metadata", Status.FAILED, float(len(served.moved)), 0.0, where, f"moved between two batches: {hint}")
        ]
    return [Finding("metadata", Status.PASSED, 0.0, 0.0)]


def _faults(held: Mapping[str, Any], wanted: Mapping[str, list[int]], view: View) -> Iterator[tuple[str, str]]:
    """(attribute, what is wrong with it), the counts first, since what follows depends on them."""
    case = view.case
    for name in COUNTS:
        value = held.get(name)
        if value is not None and value != wanted[name][0]:
            yield name, f"holds {value}, wanted {wanted[name][0]} of requests {_lengths(case.query_lens)}"
    tokens = held.get("num_actual_tokens")
    if tokens is not None and tokens != case.total_queries:
        yield "num_actual_tokens", f"holds {tokens}, wanted {case.total_queries}"
    for part, count in (("decode", "num_decodes"), ("prefill", "num_prefills")):
        there = part in held or f"{part}_msa" in held
        if there != bool(wanted[count][0]):
            yield part, f"is {'there' if there else 'None'}, of {wanted[count][0]} requests"
    for names, entry, words in VECTORS.values():
        for name in names:
            value = _at(held, name)
            if isinstance(value, tuple) and wanted[entry]:
                dtype, cells = value
                if dtype != "int32":
                    yield name, f"is {dtype}, wanted int32"
                if cells != wanted[entry]:
                    yield name, f"holds {_lengths(cells)}, wanted {_lengths(wanted[entry])}: {words}"
    yield from _limits(held, wanted, view)
    yield from _sums(held, wanted)
    yield from _tokens(held, wanted, view)


def _limits(held: Mapping[str, Any], wanted: Mapping[str, list[int]], view: View) -> Iterator[tuple[str, str]]:
    case, [n] = view.case, wanted["num_decodes"]
    length = _at(held, "decode.decode_query_len")
    if n and length is not None and length != wanted["decode_query_len"][0]:
        yield "decode.decode_query_len", f"holds {length}, wanted {wanted['decode_query_len'][0]}"
    least = (
        ("decode.max_decode_query_len", wanted["decode_query_len"][0]),
        ("decode.max_seq_len", max(case.kv_lens[:n], default=0)),
        ("prefill.max_query_len", max(case.query_lens[n:], default=0)),
        ("prefill.max_seq_len", max(case.kv_lens[n:], default=0)),
        ("prefill_msa.max_query_len", max(case.query_lens[n:], default=0)),
        ("max_k_tiles", case.block_columns),
        ("prefill_msa.plan.max_k_tiles", _at(held, "max_k_tiles") or 0),
    )
    for name, longest in least:
        value = _at(held, name)
        if value is not None and value < longest:
            yield name, f"holds {value}, less than the longest, {longest}"


def _sums(held: Mapping[str, Any], wanted: Mapping[str, list[int]]) -> Iterator[tuple[str, str]]:
    """Running key lengths and the flat page table, which some implementations keep besides."""
    keys = _at(held, "prefill.cu_seqlens_k")
    if isinstance(keys, tuple) and wanted["prefill_seq_lens"]:
        running = [0]
        for length in wanted["prefill_seq_lens"]:
            running.append(running[-1] + length)
        if keys[1] != running:
            yield "prefill.cu_seqlens_k", f"holds {_lengths(keys[1])}, wanted {_lengths(running)}"
    total = _at(held, "prefill.total_kv_blocks")
    if total is not None and total < len(wanted["prefill_pages"]):
        yield "prefill.total_kv_blocks", f"holds {total}, less than the {len(wanted['prefill_pages'])} blocks there are"
    flat = _at(held, "prefill_msa.page_table")
    if isinstance(flat, tuple) and len(flat[1]) != len(wanted["prefill_pages"]):
        yield "prefill_msa.page_table", f"has {len(flat[1])} pages, wanted {len(wanted['prefill_pages'])}"
    pages, table = _at(held, "prefill.page_table"), _at(held, "prefill.block_table")
    if isinstance(pages, tuple) and isinstance(table, tuple):
        [first] = wanted["num_decodes"]
        right = [table[1][(entry >> 32) - first][entry & 0xFFFFFFFF] for entry in wanted["prefill_pages"]]
        if pages[1] != right:
            yield (
                "prefill.page_table",
                f"holds {_lengths(pages[1])}, wanted {_lengths(right)}: each request's pages in turn",
            )


def _tokens(held: Mapping[str, Any], wanted: Mapping[str, list[int]], view: View) -> Iterator[tuple[str, str]]:
    """What some implementations keep of each query token, and of all requests; rows that see no token bound nothing."""
    case, served = view.case, view.run.served
    assert served is not None
    prefixes = [kv - q for q, kv in zip(case.query_lens, case.kv_lens, strict=True)]
    positions = [prefix + i for prefix, q in zip(prefixes, case.query_lens, strict=True) for i in range(q)]
    [decodes], [rows] = wanted["num_decodes"], wanted["num_decode_tokens"]
    request = [r for r, q in enumerate(case.query_lens[decodes:]) for _ in range(q)]
    right: Mapping[str, tuple[list[int | None], str]] = {
        "slot_mapping": ([*served.slots], "where each token is inserted"),
        "page16_slot_mapping": ([s + max(s, 0) // BLOCK * BLOCK for s in served.slots],
                                "slot // 128 · 256 + slot % 128, negative ones kept"),
        "topk_num_valid_pages": ([p // BLOCK + 1 if p >= 0 else None for p in positions], "blocks that each token sees"),
        "topk_prefix_lens": ([*prefixes], "tokens before the first query of each request"),
        "topk_cu_seqlens_q": ([0, *accumulate(case.query_lens)], "first query row of each request"),
        "prefill.query_req_id": ([*request], "request of each prefilled token"),
        "prefill.query_abs_pos": ([*positions[rows:]], "position of each prefilled token"),
    }  # fmt: skip
    for name, (cells, words) in right.items():
        value = _at(held, name)
        if not isinstance(value, tuple):
            continue
        if len(value[1]) != len(cells) or any(b not in (None, a) for a, b in zip(value[1], cells, strict=True)):
            told = "+".join("?" if cell is None else str(cell) for cell in cells)
            yield name, f"holds {_lengths(value[1])}, wanted {_lengths([told])}: {words}"


def _unlike(one: Mapping[str, Any], two: Mapping[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    """Counts and query lengths in which two metadata objects of one batch differ."""
    for name in (*COUNTS, "decode.decode_query_len", "prefill.cu_seqlens_q"):
        a, b = _at(one, name), _at(two, name)
        if a is not None and b is not None and a != b:
            yield name, a, b


def check_handover(view: View) -> list[Finding]:
    """What the indexer returned are the rows of the id buffer that attention reads: decoded ones first, others behind."""
    served = view.run.served
    if served is None:
        return []
    rows = int(view.expected["num_decode_tokens"])
    for told in served.returned:
        if told is None:
            continue
        part, shape, inside, same = told
        span = slice(0, rows) if part == "decode" else slice(rows, view.case.total_queries)
        where = f"rows [:, {span.start}:{span.stop}] of the id buffer, {part} part"
        if not inside:
            hint = "the indexer returned a tensor of its own; a captured graph hands ids over in the persistent buffer only"
            return [Finding("handover", Status.FAILED, 1.0, 0.0, where, hint)]
        if not same and _wrong(view, span):
            hint = (
                f"the indexer returned ids of shape {shape} that are not these rows [H, rows, topk]: another layout than "
                "the buffer was allocated with, other rows, or rows that the other part wrote over"
            )
            return [Finding("handover", Status.FAILED, 1.0, 0.0, where, hint)]
    place = _elsewhere(view, rows)
    if place:
        hint = "attention reads the rows of its own queries: decoded ones first, prefilled ones behind"
        return [Finding("handover", Status.FAILED, 1.0, 0.0, "the id buffer", f"{place}; {hint}")]
    return [Finding("handover", Status.PASSED, 0.0, 0.0)]


def _wrong(view: View, span: slice) -> bool:
    """Whether some row of the id buffer lists other blocks than the reference; of one head both layouts are the same."""
    actual = view.actual("ids")[:, span].long().sort(-1).values
    return bool((actual != view.expected["ids"].to(actual.device)[:, span].long().sort(-1).values).any())


def _elsewhere(view: View, rows: int) -> str:
    """Whether one part's ids, as the reference selects them, stand in other rows than its own."""
    total = view.case.total_queries
    actual = view.actual("ids").sort(-1).values
    wanted = view.expected["ids"].to(actual.device).sort(-1).values
    for first, last in ((0, rows), (rows, total)):
        part = wanted[:, first:last]
        if first == last or (actual[:, first:last] == part).all():
            continue
        for at in range(total - (last - first) + 1):
            if at != first and (actual[:, at : at + last - first] == part).all():
                return f"ids of rows [:, {first}:{last}] stand in rows [:, {at}:{at + last - first}]"
    return ""


def check_waits(view: View) -> list[Finding]:
    """A batch of decoded requests alone, which a graph runs, is built and launched without waiting for the device."""
    served = view.run.served
    if served is None or int(view.expected["num_prefills"]):
        return []
    if served.waits:
        hint = (
            f"host code reads device memory, which a captured graph cannot do and every step waits for: {served.waits[0]}"
        )
        return [Finding("waits", Status.FAILED, float(len(served.waits)), 0.0, served.waits[0], hint)]
    return [Finding("waits", Status.PASSED, 0.0, 0.0)]


def _at(held: Any, path: str) -> Any:
    for name in path.split("."):
        held = held.get(name) if isinstance(held, Mapping) else None
    return held


def _lengths(values: Any) -> str:
    text = "+".join(map(str, values))
    return text if len(text) <= 80 else f"{text[:79]}…"
