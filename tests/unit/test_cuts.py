"""When prompts are cut: by numbers alone."""

import itertools

from compresskv.selection.cuts import Chunks, Cut, DecodeBudget, most_held, prompt_cuts

CHUNKS = Chunks(budget=40, tokens=32)


def test_a_prompt_is_cut_at_its_end() -> None:
    assert prompt_cuts(100, 24, 8) == [Cut(100, 100, 24)]
    assert prompt_cuts(24, 24, 8) == []


def test_and_at_multiples_of_a_chunk() -> None:
    cuts = prompt_cuts(100, 24, 8, CHUNKS)  # 32 tokens are no more than stay, and 96 too near to the end
    assert cuts == [Cut(64, 64, 40), Cut(100, 76, 24)]
    assert [cut.num_lost for cut in cuts] == [24, 76]
    assert prompt_cuts(104, 24, 8, CHUNKS) == [Cut(64, 64, 40), Cut(96, 72, 40), Cut(104, 48, 24)]
    assert prompt_cuts(104, 60, 8, CHUNKS) == [Cut(64, 64, 60), Cut(96, 92, 60), Cut(104, 68, 60)]


def test_cuts_fit_together_and_bound_what_is_held() -> None:
    for num_prompt, budget, window in itertools.product(range(1, 200), (1, 8, 39, 41, 90), (1, 2, 8, 32)):
        num_kept = min(budget, num_prompt)
        cuts = prompt_cuts(num_prompt, num_kept, window, CHUNKS)
        num_read = num_held = 0
        for cut in cuts:
            num_held += cut.num_read - num_read
            assert (cut.num_read > num_read, cut.num_held) == (True, num_held)
            assert num_kept <= cut.num_kept < num_held
            assert cut.num_read - num_read >= min(num_prompt, max(2, window))
            num_read, num_held = cut.num_read, cut.num_kept
        assert num_held + num_prompt - num_read <= max(num_kept, num_prompt if not cuts else 0)
        assert most_held(num_prompt, cuts) <= max(40, num_kept) + 32 + max(2, window) - 1


def test_an_answer_is_cut_where_it_finds_too_many_tokens() -> None:
    decode = DecodeBudget(budget=40, interval=16)
    for num_held in (3, 24, 25, 40, 90):  # of a prompt of 100 tokens
        held, expected = num_held, []
        for num_read in range(101, 300):
            held += 1
            if (num_read - 100) % 16 == 0 and held > 40:
                expected.append(Cut(num_read, held, 40))
                held = 40
        found = [decode.next_cut(100, num_held, 100)]
        while found[-1].num_read < expected[-1].num_read:
            found.append(decode.next_cut(100, num_held, found[-1].num_read))
        assert found == expected
        for num_read in range(100, expected[-1].num_read):
            assert decode.next_cut(100, num_held, num_read) == next(cut for cut in expected if cut.num_read > num_read)
