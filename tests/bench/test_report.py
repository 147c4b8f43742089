from bench import report


def test_the_table_in_the_readme_is_the_one_the_files_give() -> None:
    entries = report.results()
    assert {entry["recipe"] for entry in entries} >= {"digits", "digits-dfad", "mnist-cpu"}
    shown = report.README.read_text().partition(report.BEGIN)[2].partition(report.END)[0]
    assert shown.strip() == report.table(entries)


def test_the_table_of_kernels_in_the_readme_is_the_one_the_files_give() -> None:
    rows = report.kernel_results()
    assert {row["kernel"] for row in rows} == {"ema", "l1", "kl", "js", "concat", "moments"}
    shown = report.README.read_text().partition(report.KERNELS_BEGIN)[2].partition(report.END)[0]
    assert shown.strip() == report.kernel_table(rows)
    assert not any("dirty" in row["commit"] or row["status"].startswith("wrong") for row in rows)


def test_every_result_says_how_it_was_got() -> None:
    for entry in report.results():
        assert entry["command"].startswith("dfkd-fast distill")
        assert "dirty" not in entry["commit"]
        assert entry["versions"]["torch"]
