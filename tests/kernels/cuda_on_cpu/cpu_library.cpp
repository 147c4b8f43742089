// csrc/library.cpp, with its operators registered for tensors of a CPU.

#include "operators.h"

#include <torch/csrc/stable/library.h>

#define CUDA CPU
#include "library.cpp"
