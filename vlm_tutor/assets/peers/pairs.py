"""Answers and truths for the workers that score."""
import json, os


def read_pairs(job):
    "(prediction, truth) of every receipt"
    return [tuple(pair) for pair in json.load(open(os.path.join(job['data'], 'pairs.json')))[:job['rows']]]
