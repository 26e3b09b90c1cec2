"""The trigram table and its tree search, compiled. Arrays as in ``laconic.decoding.trigram_mcts.TrigramTable``."""

from __future__ import annotations

import math

import numpy as np

from laconic.kernels.cpu_common import jit

NONE = -1
LENGTH = 3  # new tokens of a searched path; a drafted one has one more


@jit()
def _place(a, b, slots, keys):
    """Where in the hash table the pair stands, or the free place where it would."""
    mask = np.uint64(len(slots) - 1)
    mixed = (np.uint64(a) * np.uint64(0x9E3779B97F4A7C15)) ^ (np.uint64(b) * np.uint64(0xC2B2AE3D27D4EB4F))
    at = (mixed ^ (mixed >> np.uint64(29))) & mask
    while slots[at] != NONE and not (keys[slots[at], 0] == a and keys[slots[at], 1] == b):
        at = (at + np.uint64(1)) & mask
    return at


@jit()
def _raise(a, b, c, bump, cap, clock, slots, keys, first, met, tokens, next_, scores, used):
    place = _place(a, b, slots, keys)
    slot = slots[place]
    if slot == NONE:
        slot = used[0]
        used[0] += 1
        slots[place] = slot
        keys[slot, 0], keys[slot, 1], first[slot] = a, b, NONE
    met[slot] = clock
    before, at = NONE, first[slot]
    while at != NONE and tokens[at] != c:
        before, at = at, next_[at]
    if at == NONE:
        at = used[1]
        used[1] += 1
        tokens[at], next_[at], scores[at] = c, NONE, 0.0
        if before == NONE:
            first[slot] = at
        else:
            next_[before] = at
    scores[at] = min(cap, scores[at] + bump)


@jit()
def add(triples, bumps, cap, clock, slots, keys, first, met, tokens, next_, scores, used):
    """Raises the scores of ``triples`` (n, 3) by ``bumps`` (n,), one after the other, to ``cap`` at most."""
    for i in range(len(triples)):
        a, b, c = triples[i]
        _raise(a, b, c, bumps[i], cap, clock, slots, keys, first, met, tokens, next_, scores, used)


@jit()
def copy(
    kept, slots, keys, first, met, tokens, next_, scores, used, new_slots, new_keys, new_first, new_met, new_tokens, new_next,
    new_scores, new_used,
):  # fmt: skip
    """Puts the pairs ``kept`` of a table, with their successors in order, into an empty one."""
    for slot in kept:
        at = first[slot]
        while at != NONE:
            _raise(
                keys[slot, 0], keys[slot, 1], tokens[at], scores[at], np.inf, met[slot], new_slots, new_keys, new_first, new_met,
                new_tokens, new_next, new_scores, new_used,
            )  # fmt: skip
            at = next_[at]


@jit()
def _uniform(random):
    """xorshift64*: the same numbers for the same seed, whoever else draws some."""
    x = random[0]
    x ^= x >> np.uint64(12)
    x ^= x << np.uint64(25)
    x ^= x >> np.uint64(27)
    random[0] = x
    return np.float64((x * np.uint64(0x2545F4914F6CDD1D)) >> np.uint64(11)) / 9007199254740992.0


@jit()
def _drawn(slot, first, tokens, next_, scores, random):
    """An entry after the pair at ``slot``, drawn in proportion to the scores."""
    total, at = 0.0, first[slot]
    while at != NONE:
        total += scores[at]
        at = next_[at]
    left, at = _uniform(random) * total, first[slot]
    while next_[at] != NONE:
        left -= scores[at]
        if left < 0:
            break
        at = next_[at]
    return at


@jit()
def _best(slot, first, tokens, next_, scores):
    """The entry after the pair at ``slot`` with the largest score, the first of equal ones."""
    best, at = first[slot], first[slot]
    while at != NONE:
        if scores[at] > scores[best]:
            best = at
        at = next_[at]
    return best


@jit()
def _grown(array, size):
    wider = np.zeros((size, *array.shape[1:]), array.dtype)
    wider[: len(array)] = array
    return wider


@jit()
def _child(node, links, visits, values, priors, explore, base):
    """The child to go to: mean value and prior, as in AlphaZero; one never visited comes first, the first of equal ones."""
    parent = visits[node]
    factor = (explore + math.log((parent + base + 1.0) / base)) * math.sqrt(parent)
    best, most = links[node, 1], -np.inf
    for child in range(links[node, 1], links[node, 1] + links[node, 2]):
        if visits[child] == 0:
            return child
        worth = values[child] / visits[child] + factor * priors[child] / (1.0 + visits[child])
        if worth > most:
            best, most = child, worth
    return best


@jit()
def search(a, b, iterations, most, summed, explore, base, random, slots, keys, first, met, tokens, next_, scores, used):
    """The paths to the ``most`` most visited nodes of a tree search after the tokens a, b, each with its best successor.

    Args:
        summed: whether the reward of a path is 1 plus its scores, or 1.
        random: uint64 ``(1,)``, the state of the generator.

    Returns:
        Tokens, int64 ``(paths, LENGTH + 1)``, -1 behind the last; the root's own path is left out.
    """
    links = np.zeros((256, 3), np.int64)  # parent, first child, number of children
    state = np.zeros((256, 3), np.int64)  # first and second token, depth
    priors, values, visits = np.zeros(256), np.zeros(256), np.zeros(256, np.int64)
    links[0, 0], state[0, 0], state[0, 1], count = NONE, a, b, 1
    for _ in range(iterations):
        node, reward = 0, 1.0
        while links[node, 2] > 0:
            node = _child(node, links, visits, values, priors, explore, base)
            reward += priors[node]
        slot = slots[_place(state[node, 0], state[node, 1], slots, keys)]
        if slot != NONE and state[node, 2] < LENGTH:
            links[node, 1], at = count, first[slot]
            while at != NONE:
                if count == len(priors):
                    size = 2 * count
                    links, state = _grown(links, size), _grown(state, size)
                    priors, values, visits = _grown(priors, size), _grown(values, size), _grown(visits, size)
                links[count, 0], priors[count] = node, scores[at]
                state[count, 0], state[count, 1], state[count, 2] = state[node, 1], tokens[at], state[node, 2] + 1
                count, at = count + 1, next_[at]
            links[node, 2] = count - links[node, 1]
            node = count - 1
            reward += priors[node]
        first_token, token = state[node, 0], state[node, 1]
        for _ in range(state[node, 2], LENGTH):
            slot = slots[_place(first_token, token, slots, keys)]
            if slot == NONE:
                break
            at = _drawn(slot, first, tokens, next_, scores, random)
            reward += scores[at]
            first_token, token = token, tokens[at]
        while node != NONE:
            visits[node] += 1
            values[node] += reward if summed else 1.0
            node = links[node, 0]
    return _paths(count, most, links, state, visits, slots, keys, first, tokens, next_, scores)


@jit()
def _paths(count, most, links, state, visits, slots, keys, first, tokens, next_, scores):
    order = np.argsort(-visits[:count], kind="mergesort")[:most]
    found = np.full((len(order), LENGTH + 1), NONE, np.int64)
    row = 0
    for node in order:
        depth = state[node, 2]
        if depth == 0 or visits[node] == 0:
            continue
        slot = slots[_place(state[node, 0], state[node, 1], slots, keys)]
        if slot != NONE:
            found[row, depth] = tokens[_best(slot, first, tokens, next_, scores)]
        at = node
        for place in range(depth - 1, -1, -1):
            found[row, place] = state[at, 1]
            at = links[at, 0]
        row += 1
    return found[:row]
