// A `tokenizers` JSON file of the CLIP kind: what of the library is needed to make a prompt's ids, and no more.
#pragma once
#include <memory>
#include <string_view>
#include <vector>

#include "program.h"

namespace driffusion {

class Tokenizer {
   public:
    virtual ~Tokenizer() = default;
    // All ids of a text, with those at its beginning and end, uncut.
    virtual std::vector<i64> encode(std::string_view text) const = 0;
    // Error with UNSUPPORTED, by the part's name, for a file that asks for anything else than CLIP's does.
    static std::unique_ptr<Tokenizer> load(std::string_view json);
};

}  // namespace driffusion
