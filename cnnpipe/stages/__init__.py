"""The stages of the pipeline: each reads its inputs, calls the rooms below, writes its outputs.

A stage is a module, a section of params.yaml, a stage of dvc.yaml and a task of the flow, all of
one name. Each has one function, `run`.
"""
