"""What stands on a page of a report."""

import html
import re


def headings(page):
    return set(map(html.unescape, re.findall(r"<h2>(.*?)</h2>", page)))


def cells(page, head):
    """The table whose first heading is ``head``: row -> cells."""
    table = next(t for t in re.findall(r"<table>.*?</table>", page, re.DOTALL) if f'<th scope="col">{head}</th>' in t)
    rows = re.findall(r'<tr><th scope="row">(.*?)</th>(.*?)</tr>', table)
    return {name: re.findall("<td>(.*?)</td>", rest) for name, rest in rows}
