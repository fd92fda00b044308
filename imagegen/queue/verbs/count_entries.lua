-- Counts the tasks of each client in a page of the stream.
--
-- KEYS    1 stream
-- ARGV    1 where the page begins: '-', or '(' and an entry id; 2 number of entries
-- result  where the next page begins, '' at the end; each client and its tasks
local rows = redis.pcall('XRANGE', KEYS[1], ARGV[1], '+', 'COUNT', ARGV[2])
if rows.err then return {'', {}} end
local counts, flat = {}, {}
for _, row in ipairs(rows) do
  for field = 1, #row[2], 2 do
    local client = row[2][field] == 'd' and client_of(row[2][field + 1])
    if client then counts[client] = (counts[client] or 0) + 1 end
  end
end
for client, count in pairs(counts) do flat[#flat + 1], flat[#flat + 2] = client, count end
return {#rows == tonumber(ARGV[2]) and '(' .. rows[#rows][1] or '', flat}
