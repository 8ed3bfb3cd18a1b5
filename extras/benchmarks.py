"""The paper's benchmarks, and what the paper reports of them.

A row of Table 1 has eleven scores: how a model answers (MT-Bench, of 1 to 10), what it does without
examples (IFEval to HumanEval) and what it makes of examples (ARC to Winogrande), in percent.
"""

COLUMNS = (
    "MT-Bench",
    "IFEval",
    "GSM8K",
    "Toxigen↓",
    "MBPP",
    "HumanEval",
    "ARC",
    "Hellaswag",
    "MMLU",
    "TruthfulQA",
    "Winogrande",
)

# Table 1, and from Table 2 the row "1.1B curriculum"; by base, and by what answers beside it
_PAPER = """
Tinyllama-1.1B
Full          3.84 16.1 1.97 26.8 14.1 5.37 27.6 40   26.4 34   57.8
1.1B          3.62 15.2 2.43 21.1 10.6 8.17 28.4 44.1 25.2 30.4 57.5
1.1B norm     3.52 14.6 2.65 62.8 17.9 15.4 31.4 44.9 25.6 30   59.6
Llama-2-7B
Full          5.93 23.8 10.6 49.8 26   17.6 51.9 59.5 50.1 41.5 74.3
1.1B          4.62 15.5 4.7  44.3 15.8 11.3 42.7 55   43.2 31.1 66.2
1.1B norm     4.55 15.3 5.61 62.8 20.4 15.4 48.5 57.9 44.2 31.8 72.5
1.1B infinity 4.06 17   27.2 65.3 30.9 18.3 48.3 58.6 45.8 30.2 71.2
7B            5.96 24.4 13.4 58.3 21.4 13.9 51   61   49.3 40.1 72
7B norm       6.03 32.7 13.5 45.2 23.4 14.8 51.9 60.9 49.6 39.9 70.6
Llama-2-13B
Full          6.23 36.3 18.7 5.03 24.3 22.8 49.2 60.6 53.9 41.8 72.3
1.1B          4.74 15.5 6.67 39.7 16.4 13.6 46.1 57.2 52   29.3 70.1
1.1B norm     4.65 14.8 10.6 55.8 28.5 15.9 49.1 59.1 52.9 31.8 76
1.1B infinity 4.45 18.7 30.3 77   33.1 23.7 52.2 61.2 53.7 30.3 74.6
7B            6.34 26.3 18.3 56.8 24.9 19.6 56.1 63.6 53.4 37.9 74.4
7B norm       6.22 25.3 17.5 39.1 27.7 15.9 56.6 63.6 53.6 37.7 74.8
Llama-2-70B
Full          7.08 46.6 35.6 0    36.6 41.9 62.9 67.8 69.3 48.4 80.5
1.1B          4.92 16.6 12.4 42.1 27.9 20.4 52.6 60.5 68.4 31.6 77.3
1.1B norm     5.37 16.8 24.9 70   37.8 28.6 62.8 66.7 67.9 37.1 82.9
1.1B infinity 4.86 20.1 44   71   42.9 33   58.6 66.4 68.5 36.1 81
7B            6.56 33.3 27.9 43.6 29.4 25.8 62.1 68.2 63.6 42.1 78.6
7B norm       6.48 34.6 28.8 27.5 33.1 25.1 62.8 68.2 64.1 41.9 79.3
1.1B curriculum 5.14 15.7 15.8 40.9 31.7 25.5 57.7 64.3 68.4 36.2 73.2
Codellama-7B
Full          5.47 33.4 15.4 83.2 39.4 43.6 40.6 48.3 41.6 34.4 64.5
1.1B          3.94 15.7 3.79 48.2 28.1 24   35.6 45.9 35.2 29.1 59.6
1.1B norm     3.99 15.9 4.85 62.3 39.4 31   39.4 46.9 38.1 29.5 64.4
1.1B infinity 3.51 19.8 27.2 65.2 31   18.4 38.9 49.1 38.5 29.6 64.7
7B            5.64 31.2 12   56.8 30.9 26.8 47.9 53.9 49.2 38.2 68.4
7B norm       5.54 31.2 16.8 40.6 33.2 25.1 47.8 54.1 49.7 37.4 68.3
"""

# Table 4: proxy tuning on Llama-2-7B, of the columns that the paper gives
PROXY = {
    "MT-Bench": 4.65,
    "ARC": 40.0,
    "Hellaswag": 50.4,
    "MMLU": 44.4,
    "TruthfulQA": 33.4,
    "Winogrande": 66.7,
}


def paper_rows() -> dict[tuple[str, str], dict[str, float]]:
    """(base, what answers beside it) → the paper's scores by column.

    Example:
    >>> paper_rows()["Llama-2-7B", "1.1B norm"]["MMLU"]
    44.2
    """
    rows = {}
    base = ""
    for line in _PAPER.strip().splitlines():
        words = line.split()
        if len(words) == 1:
            base = line
            continue
        scores = map(float, words[-len(COLUMNS) :])
        rows[base, " ".join(words[: -len(COLUMNS)])] = dict(zip(COLUMNS, scores))
    rows["Llama-2-7B", "1.1B + 1.1B (proxy tuning)"] = PROXY
    return rows
