// Files of a bundle, read once: what is used is what was checked.
#pragma once
#include <string>

#include "driffusion.h"
#include "program.h"

namespace driffusion {

// The content of a file; Error with `status` when it cannot be read or is larger than `most` bytes.
std::string read_file(const std::string &path, driffusion_status status, u64 most);
// The content of a file of the bundle, or only its check (`keep` false); Error with BUNDLE when it is not the one.
std::string read_checked(const std::string &folder, const Program &program, const File &file, bool keep = true);
// The processor as far as compiled kernels depend on it, as `engines.ort.machine` says it.
std::string machine();
u32 cores();

}  // namespace driffusion
