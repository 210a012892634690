"""What a field of a configuration says of itself: when it may differ from that of the run in a workdir.

A network's or a data set's own dataclass marks its fields like any other:

    remat: bool = dataclasses.field(default=False, metadata=MAY_CHANGE)

Of a field that is itself a dataclass the mark holds for all that is in it.
"""

WHEN = "may change"
"""The key of the mark."""
MAY_CHANGE = {WHEN: "at any time"}
"""It changes neither the gradient of a step nor what came before: a run may go on with another one."""
MAY_CHANGE_AFTER = {WHEN: "after training"}
"""It shapes no parameter once they are trained: a run may be sampled and measured with another one."""
LATER = {"later": True}
"""It came after there were runs: at its default it is not told of a run, so that those that lack it are the same."""
