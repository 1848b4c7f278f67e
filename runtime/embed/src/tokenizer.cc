#include "tokenizer.h"

#include "error.h"

namespace driffusion {

std::unique_ptr<Tokenizer> Tokenizer::load(std::string_view) { fail(DRIFFUSION_ERROR_UNSUPPORTED, "no words yet"); }

}  // namespace driffusion
