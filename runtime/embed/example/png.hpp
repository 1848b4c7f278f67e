// A PNG without compression (RFC 2083, stored blocks of RFC 1951): enough to look at an image.
#pragma once
#include <algorithm>
#include <array>
#include <cstdint>
#include <fstream>
#include <stdexcept>
#include <string>
#include <vector>

inline void write_png(const std::string &path, const std::uint8_t *rgb, std::uint32_t width, std::uint32_t height) {
    auto big = [](std::string &to, std::uint32_t value) {
        for (int shift = 24; shift >= 0; shift -= 8) to += static_cast<char>(value >> shift);
    };
    auto chunk = [&](std::string &to, const std::string &name, const std::string &data) {
        std::string body = name + data;
        std::uint32_t crc = ~0u;
        for (unsigned char byte : body) {
            crc ^= byte;
            for (int bit = 0; bit < 8; ++bit) crc = crc >> 1 ^ (crc & 1 ? 0xedb88320u : 0);
        }
        big(to, static_cast<std::uint32_t>(data.size()));
        to += body;
        big(to, ~crc);
    };
    std::string rows;
    for (std::uint32_t y = 0; y < height; ++y) {
        rows += '\0';  // no filter
        rows.append(reinterpret_cast<const char *>(rgb) + std::size_t(y) * width * 3, std::size_t(width) * 3);
    }
    std::string header, stream = "\x78\x01", file = "\x89PNG\r\n\x1a\n";
    big(header, width);
    big(header, height);
    header += std::string("\x08\x02\0\0\0", 5);
    std::uint32_t a = 1, b = 0;  // Adler-32
    for (unsigned char byte : rows) a = (a + byte) % 65521, b = (b + a) % 65521;
    for (std::size_t start = 0; start < rows.size(); start += 65535) {
        std::size_t size = std::min<std::size_t>(65535, rows.size() - start);
        stream += static_cast<char>(start + size == rows.size());
        for (std::size_t value : {size, ~size}) stream += static_cast<char>(value), stream += static_cast<char>(value >> 8);
        stream.append(rows, start, size);
    }
    big(stream, b << 16 | a);
    chunk(file, "IHDR", header);
    chunk(file, "IDAT", stream);
    chunk(file, "IEND", "");
    std::ofstream out(path, std::ios::binary);
    out.write(file.data(), static_cast<std::streamsize>(file.size()));
    out.close();
    if (!out) throw std::runtime_error(path + " cannot be written");
}
