"""Whether the server or a document is at fault, without a server."""

from inpars_lib.formats.records import Doc
from inpars_lib.llm.jobs import TRIES, Job, JobQueue


def job(doc_id: str) -> Job:
    return Job(Doc(doc_id, "text"), 1)


def fail(jobs: JobQueue, failing: Job, times: int = TRIES) -> None:
    """Let a request fail, as often as it is sent."""
    for _ in range(times):
        jobs.on_failure(failing, 0.0, "oops", None)
        if failing in jobs.waiting:
            jobs.waiting.remove(failing)


def test_a_document_that_fails_while_others_are_answered_is_given_up() -> None:
    jobs, bad = JobQueue(), job("bad")
    jobs.on_failure(bad, 0.0, "oops", None)
    assert jobs.pop(0.0) is None  # backs off
    assert jobs.pop(10.0) is bad
    jobs.on_answer(job("good"))
    fail(jobs, bad, TRIES - 1)
    assert jobs.put_aside == [bad]
    for given_up in ([], [bad]):
        assert jobs.queue_last_tries()
        assert jobs.pop(100.0) is bad
        fail(jobs, bad, 1)
        assert jobs.queue_last_tries()
        probe = jobs.pop(100.0)
        assert (probe.is_probe, probe.doc.doc_id) == (True, "good")
        assert jobs.on_answer(probe) == given_up
    assert not jobs.queue_last_tries()


def test_an_outage_in_the_last_tries_fails_no_document() -> None:
    jobs, innocent = JobQueue(), job("innocent")
    jobs.on_answer(job("good"))
    fail(jobs, innocent)
    for _ in range(20):  # the outage
        assert jobs.queue_last_tries()
        assert jobs.pop(1000.0) is innocent
        fail(jobs, innocent, 1)
        assert jobs.queue_last_tries()
        probe = jobs.pop(1000.0)
        assert probe.is_probe
        jobs.on_failure(probe, 0.0, "oops", None)
        jobs.put_aside.extend(jobs.waiting)
        jobs.waiting.clear()
    assert innocent.strikes == 0


def test_an_outage_that_ends_before_the_probe_fails_no_document() -> None:
    jobs, innocent = JobQueue(), job("innocent")
    jobs.on_answer(job("good"))
    fail(jobs, innocent)
    jobs.queue_last_tries()
    assert jobs.pop(1000.0) is innocent
    fail(jobs, innocent, 1)
    jobs.queue_last_tries()
    assert jobs.on_answer(jobs.pop(1000.0)) == []  # one strike
    assert jobs.pop(1000.0) is innocent


def test_without_an_answer_all_are_tried_again() -> None:
    jobs, first = JobQueue(), job("first")
    fail(jobs, first)
    for _ in range(5):
        assert jobs.queue_last_tries()
        assert jobs.pop(1000.0) is first
        fail(jobs, first, 1)
        assert jobs.in_doubt == [first]
