"""What a run leaves behind: its folder, tape, checkpoints and digests. Importing it never imports torch.

`files` holds the safe ways to write, `weights` the safetensors format; `digest`, `tape`, `checkpoint` and `folder`
stand on these two.
"""
