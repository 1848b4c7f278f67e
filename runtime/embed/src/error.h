// What goes wrong inside the library: thrown here, turned into a status at the boundary.
#pragma once
#include <exception>
#include <string>
#include <utility>

#include "driffusion.h"

namespace driffusion {

class Error : public std::exception {
   public:
    Error(driffusion_status status, std::string message) : status_(status), message_(std::move(message)) {}
    const char *what() const noexcept override { return message_.c_str(); }
    driffusion_status status() const noexcept { return status_; }

   private:
    driffusion_status status_;
    std::string message_;
};

[[noreturn]] inline void fail(driffusion_status status, std::string message) { throw Error(status, std::move(message)); }

}  // namespace driffusion
