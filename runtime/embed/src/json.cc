#include "json.h"

#include <charconv>
#include <system_error>

#include "error.h"

namespace driffusion {
namespace {

constexpr int DEEPEST = 64;

class Parser {
   public:
    explicit Parser(std::string_view text) : text_(text) {}

    Json whole() {
        Json value = any(0);
        skip();
        if (at_ != text_.size()) wrong();
        return value;
    }

   private:
    [[noreturn]] void wrong() const { fail(DRIFFUSION_ERROR_BUNDLE, "the tokenizer's file is no JSON at byte " + std::to_string(at_)); }
    char peek() const { return at_ < text_.size() ? text_[at_] : '\0'; }
    void skip() {
        while (peek() == ' ' || peek() == '\n' || peek() == '\t' || peek() == '\r') ++at_;
    }
    bool take(std::string_view word) {
        if (text_.substr(at_, word.size()) != word) return false;
        at_ += word.size();
        return true;
    }
    void expect(std::string_view word) {
        if (!take(word)) wrong();
    }

    Json any(int depth) {
        if (depth > DEEPEST) wrong();
        skip();
        Json value;
        if (take("null")) {
        } else if (take("true")) {
            value.kind = Json::Kind::True;
        } else if (take("false")) {
            value.kind = Json::Kind::False;
        } else if (peek() == '"') {
            value.kind = Json::Kind::Text;
            value.text = string();
        } else if (take("[")) {
            value.kind = Json::Kind::List;
            for (skip(); !take("]");) {
                if (!value.list.empty()) expect(",");
                value.list.push_back(any(depth + 1));
                skip();
            }
        } else if (take("{")) {
            value.kind = Json::Kind::Object;
            for (skip(); !take("}");) {
                if (!value.object.empty()) expect(",");
                skip();
                std::string key = string();
                skip();
                expect(":");
                value.object[key] = any(depth + 1);
                skip();
            }
        } else {
            value.kind = Json::Kind::Number;
            value.number = number();
        }
        return value;
    }

    double number() {
        std::size_t end = text_.find_first_not_of("+-.0123456789eE", at_);
        std::string word(text_.substr(at_, end == text_.npos ? end : end - at_));
        double value = 0;  // not by strtod, which takes the host's decimal point
        auto [stop, error] = std::from_chars(word.data(), word.data() + word.size(), value);
        if (error != std::errc() || stop != word.data() + word.size()) wrong();
        at_ += word.size();
        return value;
    }

    char32_t four() {
        char32_t code = 0;
        for (int n = 0; n < 4; ++n, ++at_) {
            char c = peek();
            int digit = c >= '0' && c <= '9' ? c - '0' : c >= 'a' && c <= 'f' ? c - 'a' + 10 : c >= 'A' && c <= 'F' ? c - 'A' + 10 : -1;
            if (digit < 0) wrong();
            code = code * 16 + char32_t(digit);
        }
        return code;
    }

    std::string string() {
        expect("\"");
        std::string made;
        for (;;) {
            if (at_ >= text_.size()) wrong();
            char c = text_[at_++];
            if (c == '"') return made;
            if (c != '\\') {
                made += c;
                continue;
            }
            static const std::string_view escapes = "\"\\/bfnrt", meant = "\"\\/\b\f\n\r\t";
            auto known = escapes.find(peek());
            if (peek() && known != escapes.npos) {
                made += meant[known];
                ++at_;
                continue;
            }
            expect("u");
            char32_t code = four();
            if (code >= 0xd800 && code < 0xdc00) {
                expect("\\u");
                char32_t low = four();
                if (low < 0xdc00 || low > 0xdfff) wrong();
                code = 0x10000 + ((code - 0xd800) << 10) + (low - 0xdc00);
            }
            append_utf8(made, code);
        }
    }

    std::string_view text_;
    std::size_t at_ = 0;
};

}  // namespace

void append_utf8(std::string &text, char32_t code) {
    if (code < 0x80) {
        text += char(code);
    } else if (code < 0x800) {
        text += char(0xc0 | code >> 6), text += char(0x80 | (code & 0x3f));
    } else if (code < 0x10000) {
        text += char(0xe0 | code >> 12), text += char(0x80 | (code >> 6 & 0x3f)), text += char(0x80 | (code & 0x3f));
    } else {
        text += char(0xf0 | code >> 18), text += char(0x80 | (code >> 12 & 0x3f)), text += char(0x80 | (code >> 6 & 0x3f)), text += char(0x80 | (code & 0x3f));
    }
}

Json Json::parse(std::string_view text) { return Parser(text).whole(); }

const Json &Json::operator[](const std::string &key) const {
    static const Json null;
    auto found = object.find(key);
    return found == object.end() ? null : found->second;
}

}  // namespace driffusion
