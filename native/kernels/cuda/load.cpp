// load - opens libactqkv_cuda. Part of libactqkv, which knows of CUDA no more than this.
#include "kernels_cuda.h"

#include <dlfcn.h>

#include <cstdio>
#include <string>

namespace actqkv {
namespace {

#ifdef __APPLE__
constexpr const char * LIBRARY = "libactqkv_cuda.dylib";
#else
constexpr const char * LIBRARY = "libactqkv_cuda.so";
#endif

// The folder of libactqkv with a slash at its end; empty where the loader does not tell.
std::string own_folder() {
    Dl_info info;
    if (dladdr((const void *) &actqkv_cuda_load, &info) == 0 || info.dli_fname == nullptr) {
        return "";
    }
    const std::string file = info.dli_fname;
    return file.substr(0, file.rfind('/') + 1);
}

const actqkv_cuda * refuse(const std::string & why, char * reason, int32_t size) {
    snprintf(reason, (size_t) size, "%s", why.c_str());
    return nullptr;
}

const actqkv_cuda * load(const std::string & path, char * reason, int32_t size) {
    void * library = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
    if (library == nullptr) {
        const char * why = dlerror();
        return refuse(why != nullptr ? why : path + " does not load", reason, size);
    }
    const auto table_of = (const actqkv_cuda * (*)(void) ) dlsym(library, "actqkv_cuda_table");
    const actqkv_cuda * table = table_of != nullptr ? table_of() : nullptr;
    if (table == nullptr || table->interface != ACTQKV_CUDA_INTERFACE) {
        const std::string found = table == nullptr ? "none" : std::to_string(table->interface);
        dlclose(library);
        return refuse(path + ": interface " + found + ", expected " + std::to_string(ACTQKV_CUDA_INTERFACE), reason,
                      size);
    }
    return table;
}

} // namespace
} // namespace actqkv

extern "C" const actqkv_cuda * actqkv_cuda_load(const char * path, char * reason, int32_t size) {
    try {
        return actqkv::load(path != nullptr ? path : actqkv::own_folder() + actqkv::LIBRARY, reason, size);
    } catch (...) {
        return nullptr; // no memory for a path
    }
}
