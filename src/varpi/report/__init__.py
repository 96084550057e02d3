"""Pages of results: of a run (`run`), of a comparison (`comparison`); and the parts that pages are made of."""

from varpi.report.embeddings import Embeddings
from varpi.report.page import Page, render, write_page
from varpi.report.pictures import Reconstruction, SampleGrid, ScoredImages
from varpi.report.results import NamedResult
from varpi.report.tables import ClassChanges, TableRow

__all__ = [
    "ClassChanges",
    "Embeddings",
    "NamedResult",
    "Page",
    "Reconstruction",
    "SampleGrid",
    "ScoredImages",
    "TableRow",
    "render",
    "write_page",
]
