"""A case <-> its id, what an id may say, and that the defaults never move."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from m3check.cases import FILLS, SELECTIONS, case_id, complaint, parse_id, validate
from m3check.cases.ident import DEFAULTS, WORDS
from m3check.cases.validity import LAYOUTS, READS, SCALES
from m3check.types import DTYPES, OPS, SPARSE, Case, M3CheckError

ALPHABET = re.compile(r"[A-Za-z0-9._=,/~+-]+")


def parsed(text):
    """The case that a text names, or the sentence why it names none."""
    try:
        return parse_id(text), ""
    except M3CheckError as error:
        return None, str(error)


@st.composite
def any_cases(draw):
    """Cases of every op, most of them sensible; lengths are legal so that few are thrown away."""
    op = draw(st.sampled_from(tuple(SPARSE)))
    batch = draw(st.integers(1, 6))
    if OPS[op].phase == "decode":
        query_lens = (draw(st.integers(1, 9)),) * batch
        kv_lens = tuple(draw(st.lists(st.integers(0, 5000), min_size=batch, max_size=batch)))
    else:
        query_lens = tuple(draw(st.lists(st.integers(0, 200), min_size=batch, max_size=batch)))
        kv_lens = tuple(q + draw(st.integers(0, 5000)) for q in query_lens)
    choices = {
        "kv_heads": st.integers(1, 64),
        "gqa": st.integers(1, 64),
        "head_dim": st.sampled_from([64, 128, 256]),
        "topk": st.integers(1, 64),
        "init_blocks": st.integers(0, 20),
        "local_blocks": st.integers(0, 20),
        "dtype": st.sampled_from(tuple(DTYPES)),
        "cache_dtype": st.sampled_from(tuple(DTYPES)),
        "index_cache_dtype": st.sampled_from(tuple(DTYPES)),
        "scales": st.sampled_from(SCALES),
        "layout": st.sampled_from(LAYOUTS),
        "ids": st.sampled_from(tuple(SELECTIONS)),
        "max_query_len": st.integers(0, 32),
        "fill": st.sampled_from(tuple(FILLS)),
        "seed": st.integers(0, 2**40),
    }
    fields = {field: draw(choices[field]) for field in sorted(READS[op]) if draw(st.booleans())}
    return Case(op=op, query_lens=query_lens, kv_lens=kv_lens, **fields)


@given(any_cases())
def test_an_id_is_one_plain_line_and_gives_its_case_back(case):
    text = case_id(case)
    assert ALPHABET.fullmatch(text)
    if complaint(case) is None:
        assert parse_id(text) == case
        assert case_id(parse_id(text)) == text
    else:
        with pytest.raises(M3CheckError):
            parse_id(text)


@given(any_cases(), any_cases())
def test_two_cases_never_share_an_id(one, other):
    assert (case_id(one) == case_id(other)) == (one == other)


@given(any_cases(), st.randoms())
def test_words_may_come_in_any_order_and_defaults_may_be_spelled_out(case, chance):
    if complaint(case) is not None:
        return
    op, rest = case_id(case).split("/")
    rest, _, seed = rest.partition("~")
    parts = rest.split(",")
    named = {part.partition("=")[0] for part in parts}
    parts += [f"{word}={DEFAULTS[field]}" for word, field in WORDS.items() if word not in named and field in DEFAULTS]
    chance.shuffle(parts)
    assert parse_id(f"{op}/{','.join(parts)}" + (f"~{seed}" if seed else "")) == case


@given(st.text(alphabet="abkqvhd=,/~+x0123456789._-\n é", max_size=40))
def test_any_other_text_is_refused_with_a_sentence(text):
    for candidate in (text, f"index_score/{text}", f"decode/q=1,kv={text}"):
        case, sentence = parsed(candidate)
        assert case is None or parse_id(case_id(case)) == case
        assert case is not None or ("case" in sentence and len(sentence) > 20)


def test_the_example_of_the_design_reads_as_told():
    case = parse_id("sparse_attn/q=5+1+0,kv=1025+129+384,h=2,g=4,topk=8,cache=fp8_e4m3fn,scale=token,fill=wide~3")
    assert case.query_lens == (5, 1, 0)
    assert case.kv_lens == (1025, 129, 384)
    assert (case.kv_heads, case.gqa, case.topk, case.cache_dtype) == (2, 4, 8, "fp8_e4m3fn")
    assert (case.scales, case.fill, case.seed) == ("token", "wide", 3)


def test_repeated_lengths_are_written_once():
    case = Case(op="sparse_attn_decode", query_lens=(1,) * 65, kv_lens=(129,) * 64 + (1,))
    assert case_id(case) == "sparse_attn_decode/q=1x65,kv=129x64+1"
    assert parse_id("sparse_attn_decode/q=1x65,kv=129x64+1") == case


def test_the_defaults_are_frozen():
    """Ids leave them out and inputs are keyed by ids: a changed default would silently change every case."""
    assert dict(DEFAULTS) == {
        "kv_heads": 4, "gqa": 16, "head_dim": 128, "topk": 16, "init_blocks": 0, "local_blocks": 1, "dtype": "bf16",
        "cache_dtype": "bf16", "index_cache_dtype": "bf16", "scales": "none", "layout": "hnd", "ids": "full",
        "max_query_len": 0, "layer": "sparse", "queries": "out", "rotary_dim": 64, "index_heads": 0,
        "eps": "1e-6", "fill": "gauss", "seed": 0,
    }  # fmt: skip
    assert set(WORDS.values()) == set(Case.__dataclass_fields__) - {"op", "seed"}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", ["unknown op ''", "index_score"]),
        ("attn/q=1,kv=1", ["unknown op 'attn'", "sparse_attn_decode"]),
        ("index_topkk/q=1,kv=1", ["unknown op 'index_topkk' (did you mean index_topk?)"]),
        ("index_topk/q=1,kvs=1", ["'kvs=1' is not word=value with a known word (did you mean kv?)"]),
        ("prefill", ["'/'", "prefill/q="]),
        ("prefill/q=1", ["kv=…", "missing"]),
        ("prefill/q=1,kv=1,heads=3", ["'heads=3'", "topk", "icache"]),
        ("prefill/q=1,kv=1,topk", ["'topk'", "word=value"]),
        ("prefill/q=1,kv=1,q=2", ["q", "twice"]),
        ("prefill/q=1,kv=1+", ["kv", "129x64", "''"]),
        ("prefill/q=1,kv=1x0", ["kv", "'1x0'"]),
        ("prefill/q=1x999999999,kv=1", ["more than"]),
        ("prefill/q=1,kv=1,topk=-1", ["topk", "whole number", "'-1'"]),
        ("prefill/q=1,kv=1,topk=0", ["topk", "at least 1"]),
        ("prefill/q=1,kv=1,fill=flat", ["fill", "'flat'", "gauss"]),
        ("prefill/q=1,kv=1,ids=odd", ["ids", "'odd'", "holes"]),
        ("prefill/q=1,kv=1,layout=odd", ["layout", "'odd'", "pool"]),
        ("prefill/q=1,kv=1,cache=int8", ["cache", "'int8'", "fp8_e4m3fn"]),
        ("prefill/q=1,kv=1~x", ["seed", "'x'"]),
        ("prefill/q=1+1,kv=9", ["2 query lengths but 1"]),
        ("prefill/q=5,kv=4", ["5 queries but 4 visible"]),
        ("prefill/q=0,kv=4", ["at least one query"]),
        ("decode/q=1+2,kv=4+4", ["same query length", "1+2"]),
        ("decode/q=1,kv=0", ["at least one request with a visible token"]),
        ("decode/q=1,kv=999999999999", ["at most 134217728 tokens"]),
        ("decode/q=2,kv=9,mq=2", ["mq=2", "exceed"]),
        ("prefill/q=1,kv=1,mq=4", ["prefill does not read mq"]),
        ("index_score/q=1,kv=1,g=4", ["index_score does not read g"]),
        ("index_topk/q=1,kv=1,cache=fp16", ["index_topk does not read cache"]),
        ("index_score/q=1,kv=1,layout=nhd", ["one head", "pool"]),
        ("sparse_attn/q=1,kv=1,scale=token", ["fp8 cache", "bf16"]),
        ("sparse_attn/q=1,kv=1,dtype=fp8_e5m2", ["attention queries", "fp8_e5m2"]),
        ("sparse_attn/q=1,kv=1,cache=fp16", ["queries' dtype bf16", "fp16"]),
        ("prefill/q=1,kv=1,dtype=fp16,cache=fp16", ["index cache", "icache=bf16"]),
        ("index_score/q=1,kv=1,dtype=fp16,cache=fp32", ["do not multiply"]),
        ("index_score/q=1,kv=1,dtype=fp8_e5m2,cache=fp8_e4m3fn", ["do not multiply"]),
    ],
)  # fmt: skip
def test_a_bad_id_is_told_what_is_wrong_and_what_is_known(text, words):
    with pytest.raises(M3CheckError) as error:
        parse_id(text)
    for word in words:
        assert word in str(error.value)


def test_validate_names_the_case():
    with pytest.raises(M3CheckError, match=r"index_score/q=5,kv=4.*5 queries but 4"):
        validate(Case(op="index_score", query_lens=(5,), kv_lens=(4,)))
    validate(Case(op="index_score", query_lens=(5,), kv_lens=(5,)))
