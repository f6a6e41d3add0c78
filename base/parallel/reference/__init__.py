"""How parallel training works, in some dozens of lines each: to be read, and compared with torch's own in the tests.

    ddp.py              data parallel: gradients in buckets, averaged while the backward pass goes on
    zero.py             ZeRO-1: each rank keeps the optimizer's state of its share of the parameters
    ring.py             all-reduce by passing pieces round a ring
    tensor_parallel.py  a linear's columns or rows spread over ranks
    ring_attention.py   attention over positions that are spread over ranks, keys and values round a ring
    pipeline.py         GPipe's and 1F1B's schedules as tables

All of them need torch.distributed.init_process_group first, and work on CPUs (gloo) as on GPUs (NCCL).
"""
