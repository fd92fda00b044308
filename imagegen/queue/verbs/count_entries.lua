-- Counts the tasks of each client in a part of the stream.
--
-- KEYS    1 stream
-- ARGV    1 where the part begins: '-', or '(' and an entry id; 2 bytes after which no more is read
-- result  where the next part begins, '' at the end; each client and its tasks; number of commands
local start, bytes, counts, flat, commands, PAGE = ARGV[1], tonumber(ARGV[2]), {}, {}, 1, 16
repeat
  local rows = redis.pcall('XRANGE', KEYS[1], start, '+', 'COUNT', PAGE)
  if rows.err then rows = {} end
  commands, start = commands + 1, #rows == PAGE and '(' .. rows[#rows][1] or ''
  for _, row in ipairs(rows) do
    for field = 1, #row[2], 2 do
      bytes = bytes - #row[2][field + 1]
      local client = row[2][field] == 'd' and client_of(row[2][field + 1])
      if client then counts[client] = (counts[client] or 0) + 1 end
    end
  end
until bytes <= 0 or start == ''
for client, count in pairs(counts) do flat[#flat + 1], flat[#flat + 2] = client, count end
return {start, flat, commands}
