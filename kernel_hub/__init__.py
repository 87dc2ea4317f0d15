"""``python -m kernel_hub OUT --repo_id OWNER/NAME``: ``meft_kernels`` as a project for the Kernel Hub.

``project/`` holds what is the hub's own, the card and the build's settings among it; the kernels are made
from ``meft_kernels`` each time. ``python39`` writes them in the syntax that the hub asks for, ``tree`` the
folder.
"""
