"""Tests of the Keras adapter. They run on the back end that KERAS_BACKEND names: one per process."""
