"""A decode kernel in plain torch with a planted mistake: a last block of one token is lost. docs/debugging.md finds it.

m3check explain sparse_attn_decode/q=1x3,kv=1281+1409+1200,h=2,g=4,topk=4 --kernels examples/lost_tail.py
"""

import torch


def sparse_attn_decode(q, kv_cache, topk_idx, block_table, seq_lens, sm_scale, output, decode_query_len):
    heads, dim = kv_cache.shape[1], q.shape[-1]
    group = q.shape[1] // heads
    for row in range(q.shape[0]):
        request, i = divmod(row, decode_query_len)
        seen = int(seq_lens[request]) - decode_query_len + i + 1
        whole = (seen + 126) // 128  # wrong: a block of one token is not counted; (seen + 127) // 128 is right
        for head in range(heads):
            lanes = slice(head * group, (head + 1) * group)
            listed = [int(b) for b in topk_idx[head, row] if 0 <= b < whole]
            if not listed:
                output[row, lanes] = 0
                continue
            pages = [kv_cache[int(block_table[request, b]), head, : seen - b * 128] for b in listed]
            kv = torch.cat(pages).float()
            weight = (q[row, lanes].float() @ kv[:, :dim].T * sm_scale).softmax(-1)
            output[row, lanes] = (weight @ kv[:, dim:]).to(output.dtype)
