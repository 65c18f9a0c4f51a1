"""devices/base.py, as assertions: the same over the fake decoder, our own kernels, ONNX Runtime and OpenVINO."""

from __future__ import annotations

import numpy as np
import pytest

from devices.base import SNAPSHOT_STEP, Decoder, Snapshot, Step, Trimming
from devices.errors import ContextOverflow, DeviceError, EngineError, OutOfKVCache, OutOfSequences
from tests.devices.contract import CHUNK, CONTEXT, SEQUENCES, Open, alone, feed, ids, same


class TestContract:
    def test_limits_are_those_asked_for(self, decoder: Decoder) -> None:
        limits = decoder.limits
        assert limits.max_context == CONTEXT
        assert 0 < limits.max_prompt <= CONTEXT
        assert limits.max_sequences in (SEQUENCES, 1)
        assert limits.prefill_chunk == CHUNK
        assert limits.kv_tokens >= min(limits.max_sequences, 4) * CONTEXT
        assert limits.kv_bytes_per_token > 0
        assert ":" in decoder.device

    def test_the_history_matters(self, decoder: Decoder) -> None:
        tokens, other = ids(1, 20), ids(1, 20)
        other[0] += 1
        a, b = alone(decoder, tokens), alone(decoder, other)
        assert np.abs(a[-1] - b[-1]).max() > 1e-3
        same(decoder, alone(decoder, tokens), a)

    @pytest.mark.parametrize("sizes", [[1], [7], [CHUNK], [1, 31, 2], [32], [33]])
    def test_chunked_is_as_in_one_call(self, decoder: Decoder, sizes: list[int]) -> None:
        tokens = ids(2, 100)
        expected = alone(decoder, tokens)
        sequence = decoder.new_sequence(100)
        same(decoder, feed(decoder, sequence, tokens, sizes), expected)
        assert sequence.length == 100
        assert sequence.nbytes >= 100 * decoder.limits.kv_bytes_per_token
        sequence.close()

    @pytest.mark.usefixtures("several")
    def test_a_ragged_batch_is_as_alone(self, decoder: Decoder) -> None:
        histories = [ids(seed, length) for seed, length in ((1, 1), (2, 33), (3, 64), (4, 90), (5, 17))]
        expected = [alone(decoder, tokens) for tokens in histories]
        sequences = [decoder.new_sequence() for _ in histories]
        done = [0] * len(histories)
        turn = 0
        while any(d < len(h) for d, h in zip(done, histories, strict=True)):
            batch, parts = [], []
            for i, tokens in enumerate(histories):
                count = min((1, 9, 32, 1, 5)[(i + turn) % 5], len(tokens) - done[i])
                if count and (i + turn) % 4:  # not everyone takes part in every batch
                    batch.append(Step(sequences[i], tokens[done[i] : done[i] + count], count))
                    parts.append((i, count))
            turn += 1
            if not batch:
                continue
            for (i, count), rows in zip(parts, decoder.forward(batch), strict=True):
                same(decoder, rows, expected[i][done[i] : done[i] + count])
                done[i] += count
        for sequence in sequences:
            sequence.close()

    @pytest.mark.usefixtures("several")
    def test_decode_rows_in_a_batch_are_as_alone(self, decoder: Decoder) -> None:
        histories = [ids(seed, 12 + 20 * seed) for seed in range(4)]
        expected = [alone(decoder, tokens) for tokens in histories]
        sequences = [decoder.new_sequence() for _ in histories]
        for sequence, tokens in zip(sequences, histories, strict=True):
            feed(decoder, sequence, tokens[:-5], [CHUNK])
        for back in range(5, 0, -1):
            batch = [Step(s, h[len(h) - back : len(h) - back + 1]) for s, h in zip(sequences, histories, strict=True)]
            for rows, whole in zip(decoder.forward(batch), expected, strict=True):
                same(decoder, rows, whole[len(whole) - back : len(whole) - back + 1])
        sequences[1].close()  # the others go on without it
        batch = [Step(sequences[i], np.array([3])) for i in (3, 0, 2)]
        for i, rows in zip((3, 0, 2), decoder.forward(batch), strict=True):
            same(decoder, rows, alone(decoder, np.append(histories[i], 3))[-1:])
        for sequence in sequences:
            sequence.close()

    @pytest.mark.usefixtures("several")
    @pytest.mark.parametrize("rows", [0, 1, 4, 20])
    def test_rows_are_those_of_the_last_tokens(self, decoder: Decoder, rows: int) -> None:
        tokens = ids(3, 20)
        sequence, other = decoder.new_sequence(), decoder.new_sequence()
        first, second = decoder.forward([Step(sequence, tokens, rows), Step(other, tokens[:7], 2)])
        whole = alone(decoder, tokens)
        assert first.shape == (rows, whole.shape[1])
        same(decoder, first, whole[20 - rows :])
        same(decoder, second, whole[5:7])
        sequence.close()
        other.close()

    def test_a_batch_without_any_rows(self, decoder: Decoder) -> None:
        tokens = ids(3, 20)
        expected = alone(decoder, tokens)
        sequence = decoder.new_sequence()
        (nothing,) = decoder.forward([Step(sequence, tokens[:19], 0)])
        assert nothing.shape[0] == 0
        same(decoder, decoder.forward([Step(sequence, tokens[19:])])[0], expected[19:])
        sequence.close()

    def test_results_belong_to_the_caller(self, decoder: Decoder) -> None:
        sequence = decoder.new_sequence()
        (first,) = decoder.forward([Step(sequence, ids(1, 10), 3)])
        before = first.copy()
        decoder.forward([Step(sequence, ids(2, 10), 3)])
        assert np.array_equal(first, before)
        first[:] = 0  # and may be written to
        sequence.close()

    @pytest.mark.parametrize("length", [0, 1, 31, 32, 40, 70])
    def test_crop(self, decoder: Decoder, length: int) -> None:
        tokens, more = ids(4, 70), ids(5, 20)
        branch = np.concatenate([tokens[:length], more])
        expected = alone(decoder, branch)
        sequence = decoder.new_sequence()
        feed(decoder, sequence, tokens, [CHUNK])
        kept = sequence.crop(length)
        assert 0 <= kept <= length
        assert sequence.length == kept
        same(decoder, feed(decoder, sequence, branch[kept:], [11]), expected[kept:])
        sequence.close()

    @pytest.mark.usefixtures("several")
    @pytest.mark.parametrize("length", [0, 1, 32, 45, 70])
    def test_forks_are_independent(self, decoder: Decoder, length: int) -> None:
        tokens = ids(6, 70)
        parent = decoder.new_sequence()
        feed(decoder, parent, tokens, [CHUNK])
        twins = [parent.fork(length), parent.fork(length)]
        grandchild = twins[0].fork(length)
        assert [s.length for s in (*twins, grandchild)] == [length] * 3
        branches = [np.concatenate([tokens[:length], ids(seed, 9)]) for seed in (10, 11, 12)]
        longer = np.concatenate([tokens, ids(13, 9)])
        batch = [Step(s, b[length:], 9) for s, b in zip((*twins, grandchild), branches, strict=True)]
        results = decoder.forward([*batch, Step(parent, longer[70:], 9)])
        for rows, whole in zip(results, (*branches, longer), strict=True):
            same(decoder, rows, alone(decoder, whole)[-9:])
        decoder.check_integrity()
        parent.close()
        twins[0].close()
        (rows,) = decoder.forward([Step(twins[1], np.array([5]))])
        same(decoder, rows, alone(decoder, np.append(branches[1], 5))[-1:])
        twins[1].close()
        grandchild.close()

    @pytest.mark.usefixtures("several")
    def test_a_fork_outlives_a_cropped_parent(self, decoder: Decoder) -> None:
        tokens = ids(7, 50)
        parent = decoder.new_sequence()
        feed(decoder, parent, tokens, [CHUNK])
        child = parent.fork(45)
        kept = parent.crop(40)
        feed(decoder, parent, ids(8, 12), [12])
        same(decoder, feed(decoder, child, tokens[45:], [2]), alone(decoder, tokens)[45:])
        assert kept <= 40
        parent.close()
        child.close()

    @pytest.mark.usefixtures("snapshots")
    @pytest.mark.parametrize("length", [1, 32, 50])
    def test_snapshot_and_restore(self, decoder: Decoder, length: int) -> None:
        tokens = ids(8, length + 9)
        sequence = decoder.new_sequence()
        feed(decoder, sequence, tokens[:length], [CHUNK])
        snapshot = sequence.snapshot()
        feed(decoder, sequence, ids(9, 5), [5])  # must not reach into the snapshot
        sequence.close()
        assert snapshot is not None
        assert snapshot.length == length
        assert snapshot.nbytes > 0
        copy = decoder.new_sequence()
        copy.restore(snapshot)
        assert copy.length == length
        same(decoder, feed(decoder, copy, tokens[length:], [4]), alone(decoder, tokens)[length:])
        copy.close()

    @pytest.mark.usefixtures("snapshots")
    def test_a_snapshot_in_parts(self, decoder: Decoder) -> None:
        tokens = ids(8, 300)
        sequence = decoder.new_sequence(CONTEXT)
        feed(decoder, sequence, tokens[:290], [CHUNK])
        parts = [sequence.snapshot(0, SNAPSHOT_STEP), sequence.snapshot(SNAPSHOT_STEP, 290)]
        fork = sequence.fork(SNAPSHOT_STEP)
        sequence.close()
        copy = decoder.new_sequence(CONTEXT)
        for target, snapshots in ((copy, parts), (fork, parts[1:])):
            for snapshot in snapshots:
                assert snapshot is not None
                target.restore(snapshot)
            assert target.length == 290
            same(decoder, feed(decoder, target, tokens[290:], [10]), alone(decoder, tokens)[290:])
            with pytest.raises(EngineError):
                target.restore(snapshots[-1])  # it does not follow
            assert target.length == 300
            target.close()

    @pytest.mark.usefixtures("snapshots")
    def test_a_strange_snapshot_is_refused(self, decoder: Decoder) -> None:
        sequence = decoder.new_sequence()
        feed(decoder, sequence, ids(1, 5), [5])
        snapshot = sequence.snapshot()
        assert snapshot is not None
        for start, stop in ((0, 6), (-SNAPSHOT_STEP, 5), (1, 5), (SNAPSHOT_STEP, 5), (0, -1)):
            with pytest.raises(ValueError, match="snapshot"):
                sequence.snapshot(start, stop)
        with pytest.raises(EngineError):
            sequence.restore(snapshot)  # not empty
        sequence.crop(0)
        with pytest.raises(EngineError):
            sequence.restore(Snapshot(5, (*snapshot.arrays, snapshot.arrays[0])))
        assert sequence.length == 0
        sequence.close()

    def test_sequences_run_out(self, decoder: Decoder) -> None:
        places = decoder.limits.max_sequences
        sequences = [decoder.new_sequence() for _ in range(places)]
        with pytest.raises(OutOfSequences, match=str(places)):
            decoder.new_sequence()
        with pytest.raises(OutOfSequences):
            sequences[0].fork(0)
        sequences.pop().close()
        decoder.new_sequence().close()
        for sequence in sequences:
            sequence.close()
            sequence.close()  # idempotent

    @pytest.mark.usefixtures("several")
    def test_the_kv_cache_runs_out_and_nothing_has_changed(self, small: Decoder) -> None:
        a, b = small.new_sequence(), small.new_sequence()
        feed(small, a, ids(1, 64), [32])
        feed(small, b, ids(2, 60), [30])
        with pytest.raises(OutOfKVCache):
            small.forward([Step(b, ids(3, 1)), Step(a, ids(3, 8))])
        assert (a.length, b.length) == (64, 60)
        small.check_integrity()
        (rows,) = small.forward([Step(b, ids(3, 1))])
        a.crop(0)  # gives room for the check
        same(small, rows, alone(small, np.concatenate([ids(2, 60), ids(3, 1)]))[-1:])
        a.close()
        b.close()

    @pytest.mark.usefixtures("several")
    def test_a_snapshot_for_which_there_is_no_room(self, small: Decoder) -> None:
        a, b = small.new_sequence(), small.new_sequence()
        feed(small, a, ids(1, 80), [40])
        snapshot = a.snapshot()
        assert snapshot is not None
        with pytest.raises(OutOfKVCache):
            b.restore(snapshot)
        assert (a.length, b.length) == (80, 0)

    def test_the_context_ends_and_nothing_has_changed(self, decoder: Decoder) -> None:
        tokens = ids(4, CONTEXT)
        expected = alone(decoder, tokens)
        full = decoder.new_sequence(CONTEXT)
        others = [decoder.new_sequence() for _ in range(min(decoder.limits.max_sequences - 1, 1))]
        feed(decoder, full, tokens, [CHUNK])
        with pytest.raises(ContextOverflow, match=str(CONTEXT)):
            decoder.forward([*(Step(other, ids(1, 3)) for other in others), Step(full, ids(1, 1))])
        assert full.length == CONTEXT
        assert [other.length for other in others] == [0] * len(others)
        kept = full.crop(CONTEXT - 1)
        same(decoder, feed(decoder, full, tokens[kept:], [CHUNK])[-1:], expected[-1:])
        for sequence in (full, *others):
            sequence.close()

    def test_bad_steps_are_refused_and_nothing_has_changed(self, decoder: Decoder) -> None:
        sequence = decoder.new_sequence()
        others = [decoder.new_sequence() for _ in range(min(decoder.limits.max_sequences - 1, 1))]
        feed(decoder, sequence, ids(1, 10), [10])
        bad = [
            Step(sequence, ids(1, 0)),
            Step(sequence, ids(1, CHUNK + 1)),
            Step(sequence, np.array([-1])),
            Step(sequence, np.array([10**6])),
            Step(sequence, ids(1, 3), 4),
            Step(sequence, ids(1, 3), -1),
        ]
        batches = [[*(Step(other, ids(1, 3)) for other in others), step] for step in bad]
        batches.append([Step(sequence, ids(1, 1))] * 2)
        for batch in batches:
            with pytest.raises(ValueError):  # noqa: PT011 - the wording is the device's
                decoder.forward(batch)
            assert sequence.length == 10
            assert [other.length for other in others] == [0] * len(others)
        with pytest.raises(ValueError):  # noqa: PT011 - the wording is the device's
            decoder.forward([])
        for length in (-1, 11):
            with pytest.raises(ValueError):  # noqa: PT011 - the wording is the device's
                sequence.crop(length)
            with pytest.raises(ValueError):  # noqa: PT011 - the wording is the device's
                sequence.fork(length)
        assert sequence.length == 10
        for each in (sequence, *others):
            each.close()

    def test_a_closed_sequence(self, decoder: Decoder) -> None:
        sequence = decoder.new_sequence()
        feed(decoder, sequence, ids(1, 10), [10])
        sequence.close()
        other = decoder.new_sequence()
        for use in (
            lambda: sequence.crop(0),
            lambda: sequence.fork(0),
            lambda: sequence.snapshot(),
        ):
            with pytest.raises(DeviceError):
                use()
        with pytest.raises((DeviceError, ValueError)):
            decoder.forward([Step(other, ids(1, 3)), Step(sequence, ids(1, 3))])
        assert other.length == 0
        other.close()

    def test_a_closed_sequence_has_no_length(self, decoder: Decoder) -> None:
        sequence = decoder.new_sequence()
        sequence.close()
        with pytest.raises(DeviceError):
            _ = sequence.length
        with pytest.raises(DeviceError):
            _ = sequence.nbytes

    @pytest.mark.usefixtures("several")
    def test_a_sequence_of_another_decoder(self, decoder: Decoder, small: Decoder) -> None:
        stranger, own = small.new_sequence(), decoder.new_sequence()
        with pytest.raises(ValueError, match="decoder"):
            decoder.forward([Step(own, ids(1, 3)), Step(stranger, ids(1, 3))])
        assert (stranger.length, own.length) == (0, 0)
        stranger.close()
        own.close()

    def test_a_closed_decoder(self, opener: Open) -> None:
        decoder = opener(128)
        sequence = decoder.new_sequence()
        feed(decoder, sequence, ids(1, 10), [10])
        decoder.close()
        decoder.close()  # idempotent
        with pytest.raises(DeviceError):
            decoder.new_sequence()
        with pytest.raises(DeviceError):
            decoder.forward([Step(sequence, ids(1, 1))])
        sequence.close()

    def test_places_and_cache_are_used_again(self, small: Decoder) -> None:
        expected = alone(small, ids(1, 100))
        for turn in range(12):
            sequence = small.new_sequence()
            same(small, feed(small, sequence, ids(1, 100), [CHUNK]), expected)
            if turn % 2 and small.limits.max_sequences > 1:
                twin = sequence.fork(turn)
                sequence.close()
                twin.close()
            else:
                sequence.close()
        small.check_integrity()

    def test_trimming_changes_nothing_that_counts(self, decoder: Decoder) -> None:
        if not isinstance(decoder, Trimming):
            pytest.skip("it holds nothing beyond what its sequences need")
        expected = alone(decoder, ids(1, 100))
        kept, gone = decoder.new_sequence(), decoder.new_sequence()
        feed(decoder, kept, ids(1, 99), [CHUNK])
        feed(decoder, gone, ids(2, 100), [CHUNK])
        gone.close()
        decoder.trim()
        decoder.trim()
        same(decoder, feed(decoder, kept, ids(1, 100)[99:], [1]), expected[-1:])
        same(decoder, alone(decoder, ids(1, 100)), expected)  # in blocks that were given back
        kept.close()
        decoder.check_integrity()
