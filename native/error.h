// How C++ code reports a failure to the C API: thrown anywhere, turned into status + message in api/.
#pragma once

#include "actqkv.h"

#include <cstdarg>
#include <cstdio>
#include <stdexcept>
#include <string>

namespace actqkv {

struct error : std::runtime_error {
    int status;
    error(int status, const std::string & message) : std::runtime_error(message), status(status) {}
};

__attribute__((format(printf, 1, 2))) inline std::string format(const char * fmt, ...) {
    char buffer[sizeof(actqkv_error::message)];
    va_list args;
    va_start(args, fmt);
    vsnprintf(buffer, sizeof(buffer), fmt, args);
    va_end(args);
    return buffer;
}

} // namespace actqkv
