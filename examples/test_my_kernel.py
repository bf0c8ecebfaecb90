"""A kernel author's own test, one for each case: pytest examples/test_my_kernel.py -n auto -k 'fp8 and not pool'"""

import my_kernels  # a Triton kernel on a machine without a GPU needs TRITON_INTERPRET=1 in the environment

import m3check


@m3check.cases(op="sparse_attn_decode", tier="smoke")
def test_sparse_attn_decode(case):
    m3check.verify(case, my_kernels.sparse_attn_decode, my_kernels.PROFILE).check()
