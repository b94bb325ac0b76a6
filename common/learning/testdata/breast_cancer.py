"""Writes breast_cancer.csv: the Breast Cancer Wisconsin (Diagnostic) rows that scikit-learn ships (BSD-3).

    python breast_cancer.py > breast_cancer.csv        (scikit-learn 1.9)

Source: W. N. Street, W. H. Wolberg, O. L. Mangasarian, 1993, by way of `sklearn.datasets.load_breast_cancer`.
"""

import csv
import sys

from sklearn.datasets import load_breast_cancer

data = load_breast_cancer()
writer = csv.writer(sys.stdout, lineterminator="\n")
writer.writerow([name.replace(" ", "_") for name in data.feature_names] + ["diagnosis"])
for row, target in zip(data.data, data.target):
    writer.writerow([f"{value:g}" for value in row] + [data.target_names[target]])
