// The one symbol of libllama that no shipped header declares: the loaded tensors by name, in the buffers where they
// really live. Pinned to the exact llama-cpp-python version; CMakeLists.txt checks at configure time that it links.
#pragma once

#include <string>
#include <utility>
#include <vector>

struct ggml_tensor;
struct llama_model;

const std::vector<std::pair<std::string, ggml_tensor *>> & llama_internal_get_tensor_map(const llama_model * model);
