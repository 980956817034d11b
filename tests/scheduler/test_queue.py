"""Who is next."""

from __future__ import annotations

from srt.cache.lease import Lease
from srt.cache.radix import Node
from srt.messages import Admit, SamplingSpec, StopSpec
from srt.scheduler.queue import LPM_WINDOW, OVERTAKEN_MAX, WaitingQueue
from srt.scheduler.request import Request


def request(order: int) -> Request:
    """The request that arrived as number `order`."""
    return Request(Admit(f"r{order}", bytes(4), SamplingSpec(), StopSpec(1)), order, 100, 0)


def filled(policy: str, count: int) -> tuple[WaitingQueue, list[Request]]:
    """A queue of so many requests."""
    queue, requests = WaitingQueue(policy), [request(order) for order in range(count)]
    for waiting in requests:
        queue.add(waiting)
    return queue, requests


def orders(queue: WaitingQueue, cached: dict[int, int] | None = None) -> list[int]:
    """Ready requests, next first; `cached` maps arrival numbers to cached tokens."""
    return [ready.order for ready in queue.candidates(lambda ready: (cached or {}).get(ready.order, 0))]


def test_fcfs_serves_in_the_order_of_arrival_whatever_is_cached() -> None:
    queue, _ = filled("fcfs", 5)
    assert orders(queue, {3: 100}) == [0, 1, 2, 3, 4]


def test_a_retracted_request_is_served_before_all_younger_ones() -> None:
    queue, requests = filled("fcfs", 3)
    queue.admit(requests[0])
    queue.admit(requests[1])
    queue.add(requests[1])
    assert orders(queue) == [1, 2]


def test_lpm_serves_the_longest_cached_prefix_first_and_equals_by_age() -> None:
    queue, _ = filled("lpm", 5)
    assert orders(queue, {2: 8, 4: 16, 3: 8}) == [4, 2, 3, 0, 1]


def test_lpm_lets_nobody_be_overtaken_for_ever() -> None:
    queue, requests = filled("lpm", 1)
    for order in range(1, OVERTAKEN_MAX + 1):
        queue.add(request(order))
        first = next(queue.candidates(lambda ready: ready.order))
        assert first.order == order
        queue.admit(first)
    queue.add(request(1000))
    assert orders(queue, {1000: 64})[0] == 0
    assert requests[0].overtaken == OVERTAKEN_MAX


def test_lpm_serves_a_retracted_request_first() -> None:
    queue, requests = filled("lpm", 4)
    requests[2].retractions = 1
    assert orders(queue, {3: 100})[0] == 2


def test_lpm_looks_no_further_than_its_window() -> None:
    queue, _ = filled("lpm", LPM_WINDOW + 1)
    assert orders(queue, {LPM_WINDOW: 100})[0] == 0


def test_removed_requests_are_gone_wherever_they_waited() -> None:
    queue, requests = filled("fcfs", 4)
    lease = Lease(Node(None, b"", 1), b"", 0, 1)
    queue.park(requests[1], lease, 3)
    queue.park(requests[2], lease, 3)
    queue.remove(requests[0])
    queue.remove(requests[1])
    assert len(queue) == 2
    queue.ended(lease)
    assert orders(queue) == [2, 3]
    queue.remove(requests[2])
    queue.remove(requests[3])
    assert len(queue) == 0


def test_siblings_wake_when_their_share_is_committed_and_at_the_latest_when_the_row_ends() -> None:
    queue, requests = filled("fcfs", 3)
    root = Node(None, b"", 1)
    lease = Lease(root, b"", 0, 1)
    for waiting, pages in zip(requests, (1, 3, 2), strict=True):
        queue.park(waiting, lease, pages)
    assert (orders(queue), len(queue)) == ([], 3)
    lease.path += [root, root]
    changes = queue.changes
    queue.committed(lease)
    assert (orders(queue), len(queue)) == ([0, 2], 3)
    assert queue.changes > changes
    queue.ended(lease)
    assert orders(queue) == [0, 1, 2]
