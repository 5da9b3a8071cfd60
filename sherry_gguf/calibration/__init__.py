"""Calibrate a trained model: make its weights 3:4 sparse ternary, one transformer layer after the other.

command      the entry point and its arguments; imports PyTorch only after they have been checked
run          one calibration: text, layers, distillation, export; resumes
models       loads the model and its tokenizer, and refuses those that cannot be calibrated
sequences    the sequences of tokens to calibrate on
generation   lets the model write text
layers       a model's transformer layers, and how to call one without the others
streams      the layers' inputs and outputs for all tokens, on the disk
feedback     quantization with error feedback, which a layer may start from
training     trains one layer to give the full-precision layer's outputs
distillation trains the whole model to give the full-precision model's probabilities
"""
