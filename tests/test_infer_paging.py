"""The books of pages: whose they are, and who finds them."""

import random

import pytest

from llmlab.infer.paging import Pages


@pytest.mark.parametrize("seed", range(5))
def test_the_books_balance_whatever_is_done(seed):
    rng, books = random.Random(seed), Pages(12, 4)
    held: list[list[int]] = []
    content: dict[int, bytes] = {}
    for _ in range(2000):
        act = rng.random()
        if act < 0.35:
            taken = [page for page in (books.take() for _ in range(rng.randint(1, 3))) if page is not None]
            held.append(taken)
            for page in taken:
                content.pop(page, None)
        elif act < 0.5 and held:
            for page in rng.choice(held):
                digest = bytes([rng.randrange(30)])
                if digest not in content.values() and page not in content:
                    content[page] = digest
                    books.know(page, digest)
        elif act < 0.7:
            wanted = [bytes([rng.randrange(30)]) for _ in range(3)]
            found = books.find(wanted)
            assert [content[page] for page in found] == wanted[: len(found)]
            held.append(found)
        elif act < 0.72:
            books.forget()
            content.clear()
        elif held:
            books.release(held.pop(rng.randrange(len(held))))
        used = {page for pages in held for page in pages}
        assert books.available == books.count - len(used)
    for pages in held:
        books.release(pages)
    assert books.available == books.count
    assert sorted(books.take() for _ in range(12)) == list(range(12))
    assert books.take() is None


def test_a_page_is_known_by_all_tokens_up_to_its_end():
    books = Pages(8, 2)
    one, other = books.digests([1, 2, 3, 4, 5]), books.digests([9, 2, 3, 4, 5])
    assert len(one) == len(other) == 2
    assert not set(one) & set(other)
    assert books.digests([1, 2, 3, 4, 5, 6], one[:1]) == books.digests([1, 2, 3, 4, 5, 6])
    pages = [books.take(), books.take()]
    for page, digest in zip(pages, one, strict=True):
        books.know(page, digest)
    books.release(pages)
    assert books.find(other) == []
    assert books.find([one[0], other[1]]) == pages[:1]


def test_the_longest_unused_goes_first_and_of_a_row_its_end():
    books = Pages(3, 1)
    pages = [books.take(), books.take(), books.take()]
    for page in pages:
        books.know(page, bytes([page]))
    books.release(pages[:2])
    books.release(pages[2:])
    assert [books.take() for _ in range(3)] == [pages[1], pages[0], pages[2]]
