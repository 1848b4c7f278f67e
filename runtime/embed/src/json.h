// JSON (RFC 8259), read into a tree: of a tokenizer's file, and as strict as it needs to be for one.
#pragma once
#include <map>
#include <string>
#include <string_view>
#include <vector>

namespace driffusion {

class Json {
   public:
    enum class Kind { Null, False, True, Number, Text, List, Object };

    // Error with BUNDLE where it is no JSON.
    static Json parse(std::string_view text);

    Kind kind = Kind::Null;
    double number = 0;
    std::string text;
    std::vector<Json> list;
    std::map<std::string, Json> object;

    // A member; null where there is none.
    const Json &operator[](const std::string &key) const;
    bool is(std::string_view other) const { return kind == Kind::Text && text == other; }
    bool none() const { return kind == Kind::Null; }
    bool no() const { return kind == Kind::False; }
};

void append_utf8(std::string &text, char32_t code);

}  // namespace driffusion
