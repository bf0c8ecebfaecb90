"""What a server builds for a mixed batch before any kernel: counts, lengths, row starts, block tables, of both parts.

What they must be is told by `reference.batch`. They are read by the names of attributes, so that any implementation's
objects are judged; what one of them lacks is not.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate
from typing import Any

from m3check.checks.view import View
from m3check.types import BLOCK, Finding, Status, blocks

COUNTS = ("num_decodes", "num_decode_tokens", "num_prefills", "num_prefill_tokens")

VECTORS: Mapping[str, tuple[tuple[str, ...], str, str]] = {  # attributes: (its names, entry of the reference, words)
    "decode_seq_lens": (("decode.seq_lens",), "decode_seq_lens", "visible tokens of the decoded requests"),
    "prefill_seq_lens": (("prefill.seq_lens",), "prefill_seq_lens", "visible tokens of the prefilled requests"),
    "prefix_lens": (("prefill.prefix_lens", "prefill.context_lens", "prefill_msa.prefix_lens"), "prefill_prefix_lens",
                    "tokens before the first query of each prefilled request: seq_lens - query lengths"),
    "cu_seqlens_q": (("prefill.cu_seqlens_q", "prefill_msa.cu_seqlens_q"), "prefill_cu_seqlens_q",
                     "first query row of each prefilled request, counted from the first prefilled row"),
    "seq_lens": (("seq_lens",), "seq_lens", "visible tokens of all requests"),
}  # fmt: skip


def check_metadata(view: View) -> list[Finding]:
    """Counts, lengths and row starts of both parts, in the indexer's metadata and in attention's."""
    served = view.run.served
    if served is None:
        return []
    wanted = {
        name: view.expected[name].tolist() for name in view.expected if name.startswith(("num_", "decode_", "prefill_"))
    }
    wanted["seq_lens"] = list(view.case.kv_lens)
    for which, held, group in (("indexer", served.index, "index"), ("attention", served.main, "main")):
        for name, words in _faults(held, wanted, view, served.tables[group]):
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


def _faults(
    held: Mapping[str, Any], wanted: Mapping[str, list[int]], view: View, table: Sequence[Sequence[int]]
) -> Iterator[tuple[str, str]]:
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
    yield from _pages(held, wanted, table)
    yield from _tokens(held, wanted, view)


def _limits(held: Mapping[str, Any], wanted: Mapping[str, list[int]], view: View) -> Iterator[tuple[str, str]]:
    case, [n] = view.case, wanted["num_decodes"]
    length = _at(held, "decode.decode_query_len")
    if n and length is not None and length != wanted["decode_query_len"][0]:
        yield "decode.decode_query_len", f"holds {length}, wanted {wanted['decode_query_len'][0]}"
    longest = max(case.max_query_len, 1)
    graph = _at(held, "decode.max_decode_query_len")
    if graph is not None and graph != longest:
        yield "decode.max_decode_query_len", f"holds {graph}, wanted {longest}, the longest query that counts as a decode"
    least = (
        ("max_seq_len", max(case.kv_lens)),
        ("decode.max_seq_len", max(case.kv_lens[:n], default=0)),
        ("prefill.max_query_len", max(case.query_lens[n:], default=0)),
        ("prefill.max_seq_len", max(case.kv_lens[n:], default=0)),
        ("prefill_msa.max_query_len", max(case.query_lens[n:], default=0)),
        ("topk_max_query_len", max(case.query_lens)),
        ("max_k_tiles", case.block_columns),
        ("prefill_msa.plan.max_k_tiles", _at(held, "max_k_tiles") or 0),
    )
    for name, limit in least:
        value = _at(held, name)
        if value is not None and value < limit:
            yield name, f"holds {value}, less than the longest, {limit}"


def _sums(held: Mapping[str, Any], wanted: Mapping[str, list[int]]) -> Iterator[tuple[str, str]]:
    """Running key lengths and the number of blocks, which some implementations keep besides."""
    keys = _at(held, "prefill.cu_seqlens_k")
    if isinstance(keys, tuple) and wanted["prefill_seq_lens"]:
        running = [0, *accumulate(wanted["prefill_seq_lens"])]
        if keys != ("int32", running):
            yield "prefill.cu_seqlens_k", f"holds {keys[0]} {_lengths(keys[1])}, wanted int32 {_lengths(running)}"
    total = _at(held, "prefill.total_kv_blocks")
    if total is not None and total < len(wanted["prefill_pages"]):
        yield "prefill.total_kv_blocks", f"holds {total}, less than the {len(wanted['prefill_pages'])} blocks there are"


def _pages(
    held: Mapping[str, Any], wanted: Mapping[str, list[int]], table: Sequence[Sequence[int]]
) -> Iterator[tuple[str, str]]:
    """Pages of each request's blocks; columns past its last block name nothing."""
    [first] = wanted["num_decodes"]
    for part, rows in (("decode", table[:first]), ("prefill", table[first:])):
        value = _at(held, f"{part}.block_table")
        if not isinstance(value, tuple):
            continue
        if value[0] != "int32":
            yield f"{part}.block_table", f"is {value[0]}, wanted int32"
        if len(value[1]) != len(rows):
            yield f"{part}.block_table", f"has {len(value[1])} rows, wanted {len(rows)}"
        for i, (cells, right) in enumerate(zip(value[1], rows, strict=False)):
            count = blocks(wanted[f"{part}_seq_lens"][i])
            if cells[:count] != right[:count]:
                yield (
                    f"{part}.block_table",
                    f"row {i} holds {_lengths(cells[:count])}, wanted {_lengths(right[:count])}, the pages of request "
                    f"{i + first * (part == 'prefill')} in this cache",
                )
    flat = [table[entry >> 32][entry & 0xFFFFFFFF] for entry in wanted["prefill_pages"]]
    for name in ("prefill.page_table", "prefill_msa.page_table"):
        value = _at(held, name)
        if isinstance(value, tuple) and value != ("int32", flat):
            yield (
                name,
                f"holds {value[0]} {_lengths(value[1])}, wanted int32 {_lengths(flat)}: each request's pages in turn",
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


def _at(held: Any, path: str) -> Any:
    for name in path.split("."):
        held = held.get(name) if isinstance(held, Mapping) else None
    return held


def _lengths(values: Any) -> str:
    text = "+".join(map(str, values))
    return text if len(text) <= 80 else f"{text[:79]}…"
