"""Notice that a node will be taken away, as a cloud gives of its spot machines."""

from jobs.on_ray.patches import GET_TRAIN_CONTEXT


def is_announced() -> bool:
    """Whether Ray Train has been told that a node of this worker's group is being drained.

    The public `ray.train.get_preemption_info` is a collective call, a round trip for each step; this is what it reads
    on each rank. Ranks hear of it at different times: end after the same step by telling one another.
    """
    context = GET_TRAIN_CONTEXT.original()()
    return context.preemption_context.preemption_info is not None
