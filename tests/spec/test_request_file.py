"""Recorded requests: what the two formats say, and what is refused by its line."""

import random
from pathlib import Path

import numpy as np
import pytest

from cli.screen import refusing, tells
from expertlane.errors import SpecError, UserError
from expertlane.spec.request_file import read_requests
from expertlane.spec.workload import HASH_BLOCK, Load, check_lengths, draw_requests

FILES = Path(__file__).parent / "requests"
MOONCAKE, AZURE = FILES / "mooncake.jsonl", FILES / "azure.csv"
HEADING = "TIMESTAMP,ContextTokens,GeneratedTokens"


def test_a_trace_of_mooncake():
    found = read_requests(MOONCAKE)
    assert [each.line for each in found] == [1, 2, 5, 3]  # by arrival
    assert [each.due_s for each in found] == [0, 0, pytest.approx(1.5005), pytest.approx(3.052)]
    assert [each.prompt_len for each in found] == [1030, 1024, 5, 600]
    assert [each.output_len for each in found] == [3, 2, 1, 4]
    assert [each.hash_ids for each in found] == [(7, 8, 9), (7, 8), (), (7, 10)]


def test_a_trace_of_azure():
    found = read_requests(AZURE)
    assert [each.due_s for each in found] == pytest.approx([0, 4.314579, 4.541977], abs=1e-5)
    assert [(each.prompt_len, each.output_len) for each in found] == [
        (374, 44),
        (396, 109),
        (879, 55),
    ]


def test_columns_in_another_order_and_zones_of_time(tmp_path):
    path = tmp_path / "trace"  # its name says nothing
    path.write_text(
        "\ufeffContextTokens, GeneratedTokens, TIMESTAMP\r\n"
        "8,2,2024-05-10 01:00:00+01:00\r\n9,3,2024-05-10 00:00:02\r\n"
    )
    assert [(each.due_s, each.prompt_len) for each in read_requests(path)] == [(0, 8), (2, 9)]


def test_the_first_requests_of_a_file(tmp_path):
    assert [each.line for each in read_requests(MOONCAKE, 2)] == [1, 2]
    path = tmp_path / "long.csv"
    path.write_text(f"{HEADING}\n2024-05-10,8,2\nbroken\n")  # beyond what is asked for
    assert len(read_requests(path, 1)) == 1
    with pytest.raises(UserError, match=r"has 3 requests; --num-requests is 4$"):
        read_requests(AZURE, 4)


BAD = {
    "not JSON": ('{"timestamp": 0,', "1 JSON"),
    "no key": ('{"timestamp": 0, "input_length": 1}', "1 output_length missing"),
    "no time": ('{"timestamp": true, "input_length": 1, "output_length": 1}', "timestamp true"),
    "past": ('{"timestamp": -1, "input_length": 1, "output_length": 1}', "timestamp -1"),
    "endless": ('{"timestamp": 1e999, "input_length": 1}', "1e999 large"),
    "no length": ('{"timestamp": 0, "input_length": 0, "output_length": 1}', "1 input_length 0"),
    "no whole one": (
        '{"timestamp": 0, "input_length": 1, "output_length": 1.5}',
        "1 output_length 1.5",
    ),
    "hashes": (
        '{"timestamp": 0, "input_length": 513, "output_length": 1, "hash_ids": [1]}',
        "1 hash_ids input_length 513 2 512 tokens",
    ),
    "no hash": (
        '{"timestamp": 0, "input_length": 1, "output_length": 1, "hash_ids": ["a"]}',
        "1 hash_ids list 0",
    ),
    "deep": ('{"a":' + "[" * 10_000 + "]" * 10_000 + "}", "nested"),
    "format": ("a,b,c\n1,2,3", "1 a,b,c JSON object"),
    "cells": (f"{HEADING}\n2024-05-10,8", "line 2 3 cells"),
    "date": (f"{HEADING}\nyesterday,8,2", "2 TIMESTAMP yesterday"),
    "tokens": (f"{HEADING}\n2024-05-10,8,0", "line 2 GeneratedTokens 0"),
    "nothing": ("", "0 requests"),
    "heading alone": (HEADING, "0 requests"),
    "a long line": ("x" * (2**20 + 1), "1 1,048,576 bytes"),
}


@pytest.mark.parametrize(("content", "said"), BAD.values(), ids=BAD)
def test_bad_files(tmp_path, content, said):
    path = tmp_path / "bad"
    path.write_text(content)
    with pytest.raises(UserError) as caught:
        read_requests(path)
    assert str(caught.value).startswith(f"{path}")
    assert tells(str(caught.value), said)
    assert len(str(caught.value)) < 400


def test_all_bad_lines_are_named(tmp_path):
    path = tmp_path / "bad.csv"
    path.write_text(f"{HEADING}\n2024-05-10,0,2\n2024-05-10,8,2\nno\nno\n")
    with refusing("line 2 ContextTokens 0 4 5"):
        read_requests(path)
    path.write_text(f"{HEADING}\n" + "no\n" * 100)
    with refusing("3 4 5 6 more"):
        read_requests(path)


@pytest.mark.parametrize("content", [b"\xff\xfe\x00", b'{"a": "\xff"}'])
def test_bytes_that_are_no_text(tmp_path, content):
    path = tmp_path / "bad"
    path.write_bytes(content)
    with pytest.raises(SpecError, match="line 1 is not UTF-8"):
        read_requests(path)


@pytest.mark.parametrize("file", [MOONCAKE, AZURE], ids=lambda file: file.name)
def test_damaged_files_are_read_or_refused(tmp_path, file):
    whole, draw, path = file.read_bytes(), random.Random(0), tmp_path / "damaged"
    refused = []
    for _ in range(300):
        damaged = bytearray(whole)
        for _ in range(draw.randint(1, 4)):
            place = draw.randrange(len(damaged))
            damaged[place : place + draw.randint(0, 3)] = draw.randbytes(draw.randint(0, 3))
        path.write_bytes(damaged)
        try:
            assert all(each.due_s >= 0 for each in read_requests(path))
        except UserError as error:
            refused.append(str(error))
    assert 100 < len(refused) < 300
    assert not any("\n" in line for line in refused)


def test_no_file(tmp_path):
    with pytest.raises(SpecError, match="cannot read"):
        read_requests(tmp_path / "none")
    with refusing("folder"):
        read_requests(tmp_path)


def test_recorded_requests_arrive_as_they_did_unless_a_load_says_when():
    recorded = read_requests(MOONCAKE)
    as_recorded, closed, opened = (
        draw_requests(load, 1000, [3])
        for load in (Load.of(recorded), Load.of(recorded, batch=2), Load.of(recorded, rate=5.0))
    )
    assert [each.due_s for each in as_recorded] == [each.due_s for each in recorded]
    assert [each.due_s for each in closed] == [0] * 4
    assert opened[0].due_s == 0
    assert (np.diff([each.due_s for each in opened]) > 0).all()
    for requests in (as_recorded, closed, opened):
        assert [len(each.prompt_token_ids) for each in requests] == [1030, 1024, 5, 600]
        assert [each.output_len for each in requests] == [3, 2, 1, 4]


def test_equal_hash_ids_are_equal_tokens():
    load = Load.of(read_requests(MOONCAKE))
    first, second, free, fourth = (each.prompt_token_ids for each in draw_requests(load, 1000, [0]))
    assert first[: 2 * HASH_BLOCK] == second
    assert first[:HASH_BLOCK] == fourth[:HASH_BLOCK]
    assert first[HASH_BLOCK:600] != fourth[HASH_BLOCK:]
    assert free != first[:5]
    again, other = (draw_requests(load, 1000, [seed])[0].prompt_token_ids for seed in (0, 1))
    assert first == again != other
    assert set(draw_requests(load, 1000, [0], blank=True)[0].prompt_token_ids) == {0}


def test_a_load_of_recorded_requests_knows_its_sizes():
    load = Load.of(read_requests(MOONCAKE))
    assert (str(load), load.num_requests, load.is_closed) == ("recorded arrivals", 4, False)
    assert (str(load.prompt_len), str(load.output_len)) == ("5:1030", "1:4")
    assert load.max_len == 1032  # of one request, not of the longest prompt and output
    assert load.mean_lens == ((1030 + 1024 + 5 + 600) / 4, 2.5)
    check_lengths(load, 1032)
    with refusing("--requests 1 prompt 1030 3 tokens 1032 positions 1024 2"):
        check_lengths(load, 1024)


def test_recorded_requests_that_memory_could_not_hold(tmp_path):
    path = tmp_path / "huge.csv"
    path.write_text(HEADING + f"\n2024-05-10,{2**24},1" * 17)
    with refusing("285,212,689 268,435,456"):
        Load.of(read_requests(path))
