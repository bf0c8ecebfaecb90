"""Kernels by the names that vLLM gives them: found in a checkout or a user's file, adapted, refused with a sentence."""

import textwrap

import fake_vllm
import pytest
import torch

from m3check import cases, kernels, paging, rerun, runner
from m3check.arch import ARCHS
from m3check.kernels import contract, named
from m3check.kernels.provider import Loaded, Spec
from m3check.types import Kernel, PlanLine, Profile, Status

LATENT = textwrap.dedent("""
    import torch
    from vllm.triton_utils import LOGE2

    def triton_bf16_mla_sparse_interface(q, kv, indices, sm_scale, d_v=512, block_dpe=64):
        ids = indices[:, 0].long()
        k = kv[ids.clamp(min=0), 0].float().masked_fill((ids < 0)[..., None], 0)
        logits = (q.float() @ k.mT * sm_scale).masked_fill((ids < 0)[:, None], -float("inf"))
        lse = torch.logsumexp(logits, -1)
        out = (logits.softmax(-1).nan_to_num(0) @ k[..., :d_v]).to(q.dtype)
        return out, lse * LOGE2, lse
""")
CASE = "mla_sparse/q=3,kv=200,h=1,g=2,d=576,topk=32,ids=late"


def results(spec, case=CASE):
    arch = ARCHS["sm80"]
    loaded = kernels.load(kernels.parse_spec(str(spec)), arch, "interpreted", True)
    session = runner.Session(arch, "interpreted", "cpu", loaded)
    line = PlanLine(case, case.partition("/")[0], str(spec), "interpreted")
    return loaded, runner.run_one(cases.parse_id(case), session, line, "")


def test_a_checkout_with_the_file_is_tested_and_one_without_says_so(tmp_path):
    fake_vllm.tree(tmp_path / "with", {**fake_vllm.files(), "vllm/v1/attention/ops/xpu_mla_sparse.py": LATENT})
    loaded, result = results(f"vllm:{tmp_path / 'with'}")
    assert result.status is Status.PASSED, result
    assert result.kernel == "triton_bf16_mla_sparse_interface"
    assert any(fact.endswith("xpu_mla_sparse.py") for fact in loaded.description)
    fake_vllm.tree(tmp_path / "without", fake_vllm.files())
    loaded, result = results(f"vllm:{tmp_path / 'without'}")
    assert result.status is Status.SKIPPED
    assert "vllm/v1/attention/ops" in result.reason


def test_a_checkout_whose_file_does_not_import_lacks_the_op_only(tmp_path):
    fake_vllm.tree(
        tmp_path, {**fake_vllm.files(), "vllm/v1/attention/ops/xpu_mla_sparse.py": "import vllm.nothing\n" + LATENT}
    )
    loaded, result = results(f"vllm:{tmp_path}")
    assert "does not import" in result.reason
    assert "index_score" in loaded.kernels


HELPED = LATENT.replace(
    "import torch\n",
    "import torch\nfrom vllm.platforms import current_platform\nfrom vllm.utils.platform_utils import num_compute_units\n"
    "from vllm.v1.attention.ops.part import nothing\nassert num_compute_units(None) == 108\n"
    "assert current_platform.get_device_capability().major == 8\n",
)
"""What files of the pull requests import beside kernels: a module of their own, and what the platform says."""
OPS = "vllm/v1/attention/ops"


def test_a_file_may_import_its_neighbours_and_the_first_of_two_files_counts(tmp_path):
    helper = {f"{OPS}/part.py": "nothing = 0\n"}
    spoiled = {f"{OPS}/xpu_mla_sparse.py": LATENT.replace("sm_scale)", "sm_scale * 2)")}
    fake_vllm.tree(tmp_path, {**fake_vllm.files(), **helper, **spoiled, f"{OPS}/triton_mla_sparse.py": HELPED})
    loaded, result = results(f"vllm:{tmp_path}")
    assert result.status is Status.PASSED, result
    assert {fact for fact in loaded.description if OPS in fact} == {
        f"sha256 {OPS}/triton_mla_sparse.py",
        f"sha256 {OPS}/part.py",
    }


PAGES = """
def fp8_paged_mqa_logits_triton(q, kv_cache, weights, context_lens, block_tables, max_model_len{clean}):
    out = torch.full((len(weights), max_model_len), -float("inf"){fill})
    pages = kv_cache.flatten(1)
    size, (_, next_n, _, dim) = kv_cache.shape[1], q.shape
    for row in range(len(weights)):
        page = pages[block_tables[row // next_n].long()]
        keys = page[:, : size * dim].reshape(-1, dim)
        scale = page[:, size * dim :].contiguous().view(torch.float32).flatten()
        seen = max(int(context_lens[row // next_n]) - next_n + row % next_n + 1, 0)
        dots = q[row // next_n, row % next_n].float() @ keys[:seen].contiguous().view(q.dtype).float().T
        out[row, :seen] = ((dots * scale[:seen]).clamp(min=0) * weights[row][:, None]).sum(0)
    return out

def warmup_fp8_paged_mqa_logits_triton(num_heads, head_dim, block_size, device):
    assert (num_heads, head_dim, block_size, device.type) == (4, 32, 64, "cpu")
    return "warm"
"""
LOGITS = "paged_mqa_logits/q=2x4,kv=131+64+0+65,h=1,g=4,d=32,dtype=fp8_e4m3fn,cache=fp8_e4m3fn"


@pytest.mark.parametrize("clean", [("", ""), (", clean_logits=False", " if clean_logits else 0.0")])
def test_logits_are_asked_for_with_minus_infinity_and_come_with_their_warm_up(tmp_path, clean):
    """Some versions leave cells outside a window as they are unless they are told."""
    text = "import torch\n" + PAGES.format(clean=clean[0], fill=clean[1])
    fake_vllm.tree(tmp_path / "checkout", {**fake_vllm.files(), f"{OPS}/mqa_logits_triton.py": text})
    (tmp_path / "mine.py").write_text(text)
    for spec in (f"vllm:{tmp_path / 'checkout'}", tmp_path / "mine.py"):
        loaded, result = results(spec, LOGITS)
        assert result.status is Status.PASSED, result
        kernel, case = loaded.kernels["paged_mqa_logits"], cases.parse_id(LOGITS)
        given = contract.prepare(kernel, cases.make_inputs(case), paging.World()).arguments
        assert kernel.warm_up(**given) == "warm"


def test_logits_that_decode_codes_themselves_run_where_triton_has_no_such_dtype(tmp_path):
    """sm80 is what they were written for, and Triton compiles no e4m3fn there."""
    fake_vllm.tree(
        tmp_path, {**fake_vllm.files(), f"{OPS}/mqa_logits_triton.py": "import torch\n" + PAGES.format(clean="", fill="")}
    )
    spec = kernels.parse_spec(f"vllm:{tmp_path}")
    assert kernels.refuses(spec, cases.parse_id(LOGITS), ARCHS["sm80"], "device") is None
    fnuz = cases.parse_id(LOGITS.replace("e4m3fn", "e4m3fnuz"))
    assert "decodes e4m3fn only" in kernels.refuses(spec, fnuz, ARCHS["sm80"], "device")


def test_a_users_file_may_keep_the_published_names(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(
        "import torch\n"
        "def triton_mla_sparse_attention(q, kv, indices, sm_scale, num_kv_splits=None):\n"
        "    return torch.zeros(*q.shape[:2], 512, dtype=q.dtype)\n"
    )
    _, result = results(file)
    assert result.status is Status.FAILED, "zeros are no attention"
    assert {f.check for f in result.findings if f.status is Status.FAILED} >= {"element"}


@pytest.mark.parametrize("name", [function.name for function in named.NAMED])
def test_what_a_published_function_cannot_run_is_told(name):
    function = next(each for each in named.NAMED if each.name == name)
    case = cases.parse_id("mla_sparse/q=1,kv=20,h=1,g=3,d=192,dtype=fp16,cache=fp16")
    sentence = function.refusal(case)
    assert sentence
    assert named.refusal(Kernel("u", function.op, name, Profile(), print), case) == f"{name} {sentence}"
    assert named.refusal(Kernel("u", function.op, "mine", Profile(), print), case) is None


@pytest.mark.parametrize("layout", ["", ",layout=pool"])
@pytest.mark.parametrize(
    ("wraps", "promised", "status"), [(False, True, "passed"), (True, True, "failed"), (True, False, "noted")]
)
def test_far_slots_catches_an_offset_of_32_bits(wraps, promised, status, layout):
    def mla_sparse(q, kv, indices, sm_scale, d_v):
        ids = indices[:, 0].long()
        at = ids.clamp(min=0) * kv.stride(0)
        if wraps:
            at = (at + 2**31) % 2**32 - 2**31
        flat = torch.tensor([], dtype=kv.dtype).set_(kv.untyped_storage())
        k = flat[(kv.storage_offset() + at)[..., None] % len(flat) + torch.arange(kv.shape[-1])].float()
        k = k.masked_fill((ids < 0)[..., None], 0)
        logits = (q.float() @ k.mT * sm_scale).masked_fill((ids < 0)[:, None], -float("inf"))
        return (logits.softmax(-1).nan_to_num(0) @ k[..., :d_v]).to(q.dtype)

    case = cases.parse_id(CASE.replace(",ids", f"{layout},ids"))
    profile = Profile(bitwise=frozenset({"far_slots"}) if promised else frozenset())
    loaded = Loaded(Spec("t", "t"), {case.op: Kernel("t", case.op, "mine", profile, mla_sparse)})
    session = runner.Session(ARCHS["sm80"], "interpreted", "cpu", loaded)
    inputs = cases.make_inputs(case)
    run, setting = runner.first_call(loaded.kernels[case.op], inputs, session)
    judge = runner.Judge(inputs, setting)
    assert not [f for f in judge(inputs, run) if f.status is Status.FAILED]
    [found] = rerun.findings(["far_slots"], loaded.kernels[case.op], session, inputs, run, setting, judge)
    assert found.status == status
