"""One attention call over the ranks of a torch.distributed group: Ulysses (arXiv:2309.14509) and ring
(arXiv:2310.01889) around any backend that qualifies.

Each rank has some of the tokens. `group_call.py` runs a call, `rank_group.py` moves bytes and stops the group,
`shards.py` says which token and which head is where. Nothing here starts processes or keeps membership: torchrun or Ray
does.
"""
